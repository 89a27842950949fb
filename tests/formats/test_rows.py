"""Rows are the last axis: a tensor of any rank is read, searched, written and compared as the matrix of its rows is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import random_tensor

from gemexport.exporters.gguf import choose
from gemexport.exporters.mlx.modes import Mode, columns
from gemexport.exporters.streaming import Rounding, write_packed, write_plain
from gemexport.formats import mlx
from gemexport.formats.gguf import StoredTensor
from gemexport.formats.gguf.container import Writer, read
from gemexport.formats.grids.lattice import search_all
from gemexport.formats.grids.search import GridTensor
from gemexport.formats.modules import Module
from gemexport.formats.pieces import Pieces, whole
from gemexport.formats.quantized import Layout, QuantizedTensor, read_through
from gemexport.formats.storage.bitpack import words
from gemexport.formats.storage.safetensors import Entry, MappedTensor, ShardedWriter, read_folder
from gemexport.formats.tensor import (
    ArrayTensor,
    Floats,
    Rows,
    TensorBase,
    from_bf16,
    holding,
    matrix_of,
    round_to,
    row_count,
    slices,
    to_bf16,
)
from gemexport.validators.checks.weights import compare

leading = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)  # ranks 1 to 4
stacked = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)  # ranks 2 to 4


class Watched(TensorBase):
    """A tensor that can be read by rows alone, and knows how many were asked for in one go."""

    def __init__(self, base: ArrayTensor) -> None:
        self.base, self.most = base, 0
        self.name, self.shape, self.dtype, self.grid = base.name, base.shape, base.dtype, base.grid

    def rows(self, start: int, stop: int) -> Rows:
        self.most = max(self.most, stop - start)
        return self.base.rows(start, stop)


def plain(shape: tuple[int, ...], seed: int = 0) -> ArrayTensor:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return ArrayTensor("w", from_bf16(to_bf16(values)).reshape(shape), "bf16")


def flat(tensor: ArrayTensor) -> ArrayTensor:
    """The same numbers as the matrix of the tensor's rows."""
    rows = tensor.rows(0, row_count(tensor.shape))
    return ArrayTensor(tensor.name, rows.values, tensor.dtype, rows.codes, rows.scales, tensor.grid, rows.shifts)


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((), (1, 1)), ((7,), (1, 7)), ((0,), (1, 0)), ((3, 7), (3, 7)), ((128, 1408, 2816), (180_224, 2816))],
)
def test_leading_axes_count_as_one(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert matrix_of(shape) == matrix
    assert row_count(shape) == matrix[0]


@given(leading, st.integers(1, 9), st.integers(4, 200), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_slices_cover_every_row_once(shape: tuple[int, ...], width: int, target: int, multiple: int) -> None:
    tensor = plain((*shape, width))
    bounds = list(slices(tensor, target, multiple))
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(row_count(tensor.shape)))
    assert all((stop - start) % multiple == 0 for start, stop in bounds[:-1])
    assert all(4 * width * (stop - start) <= max(target, 4 * width * multiple) for start, stop in bounds)


@given(leading, st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_a_mapped_tensor_is_read_by_rows_and_keeps_its_shape(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], width: int
) -> None:
    tensor, folder = Watched(plain((*shape, width))), tmp_path_factory.mktemp("model")
    with ShardedWriter(folder, [Entry("w", "BF16", tensor.shape)]) as out:
        write_plain(out, tensor, "bf16", [], lambda _: None)
    found = MappedTensor(read_folder(folder)["w"])
    assert found.shape == found.numpy().shape == tensor.shape
    assert np.array_equal(found.numpy(), tensor.base.numpy())
    assert np.array_equal(tensor.numpy(), tensor.base.numpy())
    assert read_through({"w": found}) == tensor.base.numpy().size
    for row in range(row_count(tensor.shape)):
        assert np.array_equal(found.rows(row, row + 1).values, tensor.base.numpy().reshape(-1, width)[row : row + 1])


def test_a_stack_of_matrices_is_never_whole_in_memory(tmp_path: Path) -> None:
    tensor = Watched(plain((8, 512, 2048)))  # 32 MiB as float32
    with ShardedWriter(tmp_path, [Entry("w", "F16", tensor.shape)]) as out:
        write_plain(out, tensor, "f16", [], lambda _: None)
    assert compare({"w": tensor}, {"w": MappedTensor(read_folder(tmp_path)["w"])}).tensors[0].compared == 8 << 20
    assert sum(part.weights for part in search_all([tensor])) == 8 << 20
    assert tensor.most * 2048 * 4 <= 16 << 20


@given(stacked, st.sampled_from([16, 32, 64, 96]), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_lattice_of_a_stack_is_that_of_its_rows(shape: tuple[int, ...], block: int, seed: int) -> None:
    tensor = random_tensor((*shape, 192), block=block, dtype="bf16", seed=seed)
    found, same = list(search_all([tensor])), list(search_all([flat(tensor)]))
    assert [part.on for part in found] == [part.weights for part in found]
    assert [part.block for part in found] == [part.block for part in same]
    scales = np.concatenate([part.scales for part in found])
    assert np.array_equal(scales, np.concatenate([part.scales for part in same]))
    assert tensor.grid is not None
    placed = GridTensor(tensor, tensor.grid, tensor.rows(0, row_count(tensor.shape)).grid()[1])
    assert np.array_equal(placed.rows(0, row_count(shape)).codes, flat(tensor).rows(0, row_count(shape)).codes)


@given(leading, st.sampled_from(["symmetric", "zero-point", "affine", "codebook"]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_stacks_are_compared_as_their_rows_are(shape: tuple[int, ...], kind: str, seed: int) -> None:
    source = random_tensor((*shape, 64), kind=kind, seed=seed)
    values: Floats = source.numpy().copy()
    values.reshape(-1)[seed % values.size] += np.float32(1)
    stored = ArrayTensor("w", values, "f32")
    found, same = compare({"w": source}, {"w": stored}), compare({"w": flat(source)}, {"w": flat(stored)})
    assert found.digest == same.digest
    ours, theirs = found.tensors[0], same.tensors[0]
    assert (ours.shape, ours.compared, ours.exact) == (source.shape, values.size, values.size - 1)
    assert (ours.exact, ours.rms_relative_error) == (theirs.exact, theirs.rms_relative_error)
    itself, alike = (compare({"w": one}, {"w": one}).tensors[0] for one in (source, flat(source)))
    assert (itself.exact, itself.same_scales) == (values.size, 1.0)
    assert itself.scale_rounded == alike.scale_rounded


@given(stacked, st.sampled_from([("symmetric", 4), ("symmetric", 8), ("affine", 4), ("codebook", 4)]))
@settings(max_examples=20, deadline=None)
def test_a_stack_in_gguf_blocks_comes_back(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], grid: tuple[str, int]
) -> None:
    source = random_tensor((*shape, 96), kind=grid[0], bits=grid[1])
    path = tmp_path_factory.mktemp("gguf") / "stack.gguf"
    kind, pack, _ = choose(source, "Q4_0")
    with Writer(path, {}, {"w": source.shape}) as out:
        for bounds in slices(source, 96 * 4 * 3):
            out.write("w", kind, pack(source.rows(*bounds)))
    container = read(path)
    found = StoredTensor(container, container.tensors["w"], "w")
    assert found.shape == found.numpy().shape == source.shape
    judged = compare({"w": source}, {"w": found}).tensors[0]
    assert judged.exact == judged.compared
    assert judged.scale_rounded


@given(stacked, st.sampled_from(["symmetric", "affine"]), st.sampled_from([2, 4, 8]))
@settings(max_examples=20, deadline=None)
def test_a_stack_in_mlx_words_comes_back(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], kind: str, bits: int
) -> None:
    source, folder = random_tensor((*shape, 96), name="m.weight", kind=kind, bits=bits), tmp_path_factory.mktemp("mlx")
    mode = Mode("affine", bits, 32)
    beside = list(columns(source, mode, Rounding("f32")))
    entries = [Entry("m.weight", "U32", (*shape, words(96, bits))), *(column.entry for column in beside)]
    with ShardedWriter(folder, entries) as out:
        write_packed(out, folder, source, ("m.weight", mode.words), beside, lambda _: None)
    stored = read_folder(folder)
    arrays = {name.removeprefix("m."): array for name, array in stored.items()}
    found = mlx._read(Module("m.weight", source.shape, arrays))
    assert found is not None
    assert found.numpy().shape == found.shape == source.shape
    judged = compare({"m.weight": source}, {"m.weight": found}).tensors[0]
    assert (judged.exact, judged.scale_rounded) == (judged.compared, True)


@given(st.data())
def test_what_dtypes_hold_is_seen_from_the_bits_as_by_rounding(data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, 32))
    patterns = data.draw(st.lists(st.integers(0, 2**32 - 1), max_size=4))
    values = np.array([pattern >> kept << kept for pattern in patterns], np.uint32).view(np.float32)
    dtypes = ("bf16", "f16", "f32")
    assert holding(values, dtypes) == tuple(
        dtype for dtype in dtypes if np.array_equal(round_to(values, dtype), values)
    )


@pytest.mark.parametrize("shift", [0, 16])
def test_each_float_of_two_bytes_is_held_by_its_own_dtype(shift: int) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    values = (
        (patterns.astype(np.uint32) << 16).view(np.float32) if shift else patterns.view(np.float16).astype(np.float32)
    )
    own, other = ("bf16", "f16") if shift else ("f16", "bf16")
    with np.errstate(over="ignore"):
        fits = round_to(values, other) == values  # type: ignore[arg-type]
    for value, both in zip(values, fits, strict=True):
        found = holding(value.reshape(1))
        assert (own in found, other in found) == (not np.isnan(value), bool(both))


def test_a_width_is_known_without_reading() -> None:
    def never(start: int, stop: int) -> Floats:
        raise AssertionError("read")

    tensor = QuantizedTensor("w", (4, 64), Layout(4, 32, never, never))  # type: ignore[arg-type]
    assert tensor.width == 4
    assert Pieces("w", (8, 64), [whole(tensor), whole(tensor)]).width == 4
    wider = QuantizedTensor("v", (4, 64), Layout(8, 32, never, never))  # type: ignore[arg-type]
    assert Pieces("w", (8, 64), [whole(tensor), whole(wider)]).width is None
