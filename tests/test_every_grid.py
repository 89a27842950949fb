"""Property tests over kinds of grids, bits, blocks, shapes and dtypes, in every format at once.

Each matrix of a small decoder gets a grid of its own; what a format writes must read back with the same codes and
scales, or the artefact names the matrix in a note and the exporter's `container` says why.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from samples import with_grids

from gemexport import demo
from gemexport.exporters.fitting import Container
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.gguf.blocks import E2M1
from gemexport.formats.tensor import (
    ArrayTensor,
    Codes,
    DType,
    Floats,
    Grid,
    Kind,
    Rows,
    Tensor,
    evaluate,
    narrowest,
    round_to,
)
from gemexport.registry import TARGETS
from gemexport.validators.checks.weights import compare

VARIANTS = [(name, variant) for name, target in TARGETS.items() for variant in target.variants]
_REFUSED = re.compile("without its grid|stays f32")  # also for what only the values decide, or the other modules
BLOCKS = (8, 16, 24, 32, 48, 64, 128, 256)
kinds = st.sampled_from(
    [*((kind, bits) for kind in ("symmetric", "zero-point", "affine") for bits in range(2, 9)), ("codebook", 4)]
)
dtypes = st.sampled_from(["bf16", "f16", "f32"])
widths = st.sampled_from([64, 80, 96, 128, 160, 256])  # some divide by few of the blocks
grids = st.lists(
    st.tuples(kinds, st.integers(0, len(BLOCKS)), dtypes, st.integers(0, 2**32 - 1)), min_size=15, max_size=15
)


def config(hidden: int, intermediate: int, vocabulary: int) -> dict[str, Any]:
    rope = {name: {"rope_type": "default", "rope_theta": 1e4} for name in ("sliding_attention", "full_attention")}
    return {
        "model_type": "gemma3_text", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": vocabulary,
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "rope_parameters": rope,
        "query_pre_attn_scalar": 32, "max_position_embeddings": 256, "tie_word_embeddings": True,
        "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def matrix(name: str, shape: tuple[int, ...], drawn: tuple[tuple[Kind, int], int, DType, int]) -> ArrayTensor:
    """A random matrix on the grid that was drawn; a block that does not divide its rows becomes a whole row."""
    (kind, bits), index, dtype, seed = drawn
    (out, width), stream = shape, np.random.default_rng(seed)
    block = BLOCKS[index] if index < len(BLOCKS) and width % BLOCKS[index] == 0 else width
    low = -(1 << bits - 1) if kind == "symmetric" else 0
    codes = stream.integers(low, low + (1 << bits), (out, width)).astype(np.int8 if low else np.uint8)
    # Of either sign, as in Q4_0; some blocks are nothing but zeros.
    scales = round_to(stream.uniform(-0.02, 0.02, (out, width // block)).astype(np.float32), dtype)
    scales[stream.random(scales.shape) < 0.02] = 0
    if kind == "codebook":
        scales = (2.0 ** stream.integers(-12, -4, scales.shape)).astype(np.float32)
    shifts = None
    if kind == "zero-point":
        shifts = stream.integers(0, 1 << bits, scales.shape).astype(np.float32)
    elif kind == "affine":
        shifts = round_to(stream.standard_normal(scales.shape).astype(np.float32) / 16, dtype)
    beside = scales if kind != "affine" or shifts is None else np.concatenate([scales, shifts])
    levels = E2M1 if kind == "codebook" else ()
    grid = Grid(bits, block, narrowest(beside), lossless=True, kind=kind, levels=levels)
    values = evaluate(grid, codes, scales, shifts).astype(np.float32)
    return ArrayTensor(name, values, "f32", codes, scales, grid, shifts)


@pytest.fixture(scope="module")
def tokenizer(tiny_gemma3: Path) -> Checkpoint:
    return open_checkpoint(tiny_gemma3)


def same(source: Tensor, stored: Tensor, container: Container) -> None:
    """The artefact's codes are the source's, and so are its scales, rounded at most to the container's dtype."""
    wanted, found = (tensor.rows(0, source.shape[0]) for tensor in (source, stored))
    assert source.grid is not None
    assert stored.grid is not None
    for i, (ours, theirs) in enumerate(zip(_codes(source.grid, wanted), _codes(stored.grid, found), strict=True)):
        assert np.array_equal(ours, theirs), i
    dtype = stored.grid.scale_dtype
    expected = [evaluate(source.grid, *wanted.grid(), wanted.shifts)]
    for rounded in {dtype, container.scales}:
        expected += [evaluate(*grid) for grid in _rounded(source.grid, wanted, rounded)]
    values = evaluate(stored.grid, *found.grid(), found.shifts)
    assert any(np.array_equal(values, each) for each in expected)


def _rounded(grid: Grid, rows: Rows, dtype: DType) -> list[tuple[Grid, Codes, Floats, Floats | None]]:
    """A grid whose scales and biases have a dtype; a zero point may become a bias of it."""
    codes, exact = rows.grid()
    scales, shifts = round_to(exact, dtype), rows.shifts
    if shifts is None or grid.kind == "affine":
        return [(grid, codes, scales, None if shifts is None else round_to(shifts, dtype))]
    return [
        (grid, codes, scales, shifts),
        (replace(grid, kind="affine"), codes, scales, round_to(-shifts * exact, dtype)),
    ]


def _codes(grid: Grid, rows: Rows) -> tuple[np.ndarray, ...]:
    """Codes as integers from zero, and levels where they are numbers of a codebook."""
    codes = rows.grid()[0].astype(np.int64)
    if grid.kind == "codebook":
        return (np.asarray(grid.levels)[codes] / max(np.abs(grid.levels)),)
    return (codes - codes.min(axis=1, keepdims=True),)


@given(widths, widths, grids)
@settings(
    max_examples=4, deadline=None, phases=[Phase.generate]
)  # an example takes seconds: shrinking would take an hour
def test_what_is_written_reads_back_or_is_refused_by_name(
    tokenizer: Checkpoint, hidden: int, intermediate: int, drawn: list[Any]
) -> None:
    asked = config(hidden, intermediate, tokenizer.architecture.vocab_size)
    plain = demo.in_memory(asked, 4)
    pending = iter(drawn)
    tensors = {
        name: matrix(name, tensor.shape, next(pending)) if len(tensor.shape) == 2 else tensor
        for name, tensor in plain.tensors.items()
    }
    checkpoint = replace(plain, tensors=tensors, unpack=tokenizer.unpack)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = with_grids(checkpoint, Path(folder) / "grids")
        for name, variant in VARIANTS:
            target, path = TARGETS[name], TARGETS[name].path(Path(folder), "model", variant)
            notes = target.exporter().export(checkpoint, path, variant=variant).notes
            judge(name, variant, checkpoint, target.reader().tensors(path), notes)


def judge(name: str, variant: str, checkpoint: Checkpoint, stored: dict[str, Tensor], notes: list[str]) -> None:
    exporter = TARGETS[name].exporter()
    for tensor in checkpoint.tensors.values():
        if tensor.grid is None:
            assert np.array_equal(stored[tensor.name].numpy().reshape(tensor.shape), tensor.numpy())
            continue
        answer = exporter.container(tensor.grid, tensor.shape[1], variant)
        refused = [note for note in notes if note.startswith(tensor.name)]
        if isinstance(answer, Container) and not any(_REFUSED.search(note) for note in refused):
            same(tensor, stored[tensor.name], answer)
            continue
        assert refused, (name, variant, tensor.name, tensor.grid, answer)
        if isinstance(answer, str):
            assert answer in refused[0]
    found = compare(checkpoint.tensors, stored, promises=TARGETS[name].promises(checkpoint, variant, {}))
    assert [(item.name, item.grid, item.broken_at) for item in found.tensors if item.kept != item.compared] == []
