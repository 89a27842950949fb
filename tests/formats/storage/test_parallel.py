"""What is in memory at a time is bounded, whatever the number of threads; results come in order."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from threading import Lock

import numpy as np
import pytest

from gemexport.demo import qat
from gemexport.exporters.gguf import _stream, choose
from gemexport.formats.gguf.container import Writer
from gemexport.formats.grids.lattice import load, search_all
from gemexport.formats.grids.search import GridTensor
from gemexport.formats.storage.parallel import IN_FLIGHT, SLICE, by_rows, room
from gemexport.formats.storage.safetensors import Entry, MappedTensor, ShardedWriter, read_folder
from gemexport.formats.tensor import ArrayTensor, Grid, row_slices
from gemexport.validators.checks.weights import compare

SHAPE = (2048, 8192)  # 64 MiB as float32
BOUND = 75 << 20  # of what a step allocates: with the 70 MB of an interpreter with Numba less than 150 MB


@pytest.mark.parametrize("threads", [1, 2, 8, 32, 128])
@pytest.mark.parametrize("width", [64, 131_072, 1 << 20])
def test_slices_in_flight_do_not_grow_with_the_threads(threads: int, width: int) -> None:
    rows = max(64, 64 * SLICE // (4 * width))
    tensor = ArrayTensor("w", np.broadcast_to(np.float32(1), (rows, width)))
    lock, started, most, consumed = Lock(), 0, 0, 0

    def touch(bounds: tuple[int, int]) -> tuple[int, int]:
        nonlocal started, most
        with lock:
            started += 1
            most = max(most, started - consumed)
        return bounds

    found = []
    for bounds in by_rows(touch, tensor, threads):
        with lock:
            consumed += 1
        found.append(bounds)
    assert found == list(row_slices(tensor.shape, SLICE))
    largest = 4 * width * max(stop - start for start, stop in found)
    assert most <= room(largest, threads) + 2  # one is about to be consumed, one takes its place
    assert room(largest, threads) * largest <= max(IN_FLIGHT, largest)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> GridTensor:
    """A tensor in a file, on a lattice."""
    folder, stream = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    scales = np.empty((SHAPE[0], SHAPE[1] // qat.BLOCK), np.float32)
    with ShardedWriter(folder, [Entry("w", "BF16", SHAPE)]) as out:
        for start, stop in row_slices(SHAPE):
            values = stream.standard_normal((stop - start, SHAPE[1]), np.float32)
            codes, scales[start:stop] = qat.quantize(values)
            out.write("w", qat.to_bf16(codes * np.repeat(scales[start:stop], qat.BLOCK, axis=1)))
    load()
    return GridTensor(MappedTensor(read_folder(folder)["w"]), Grid(4, qat.BLOCK, "bf16", lossless=True), scales)


@pytest.mark.parametrize("threads", [2, 32])
@pytest.mark.parametrize("step", ["export", "search", "compare"])
def test_what_a_step_allocates_does_not_grow_with_the_threads(
    large: GridTensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, threads: int, step: str
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    kind, pack, _ = choose(large, "Q4_0")
    tracemalloc.start()
    try:
        if step == "export":
            with Writer(tmp_path / "w.gguf", {}, {"w": SHAPE}) as out:
                assert _stream(out, "w", kind, pack, large)
        elif step == "search":
            assert all(part.on == part.weights for part in search_all([large]))
        else:
            assert compare({"w": large}, {"w": large}).tensors[0].exact_fraction == 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < BOUND
