"""Tensors and checkpoints with grids, which tests of every format need: one way to make them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.gguf.blocks import E2M1
from gemexport.formats.grids.recipe import load_recipe
from gemexport.formats.grids.search import attach, find_grids
from gemexport.formats.tensor import (
    ArrayTensor,
    Codes,
    DType,
    Floats,
    Grid,
    Kind,
    Tensor,
    evaluate,
    expand,
    matrix_of,
    round_to,
)


def with_grids(model: Path | Checkpoint, folder: Path, recipe: str = "default") -> Checkpoint:
    """A checkpoint with the grids of its tensors, which are kept in `folder`."""
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    find_grids(checkpoint, folder, load_recipe(recipe))
    return attach(checkpoint, folder)


def random_codes(shape: tuple[int, ...], bits: int, kind: Kind, stream: np.random.Generator) -> Codes:
    """Codes of all values that there are: int8 of a symmetric grid, uint8 of the others."""
    low = -(1 << bits - 1) if kind == "symmetric" else 0
    return stream.integers(low, low + (1 << bits), shape).astype(np.int8 if low else np.uint8)


def random_tensor(
    shape: tuple[int, ...],
    *,
    name: str = "w",
    kind: Kind = "symmetric",
    bits: int = 4,
    block: int = 32,
    dtype: DType = "f32",
    seed: int = 0,
) -> ArrayTensor:
    """A tensor of `shape` on a grid of a kind; its values are rounded to `dtype`, its scales are f16 and bf16 numbers.

    Scales have 6 bits, so that f16 holds their product with a zero point, too. A codebook is FP4, on powers of two.
    """
    stream = np.random.default_rng(seed)
    blocks = (*shape[:-1], shape[-1] // block)
    codes = random_codes(shape, bits, kind, stream)
    scales: Floats = (stream.integers(33, 64, blocks) * 2.0**-12).astype(np.float32)
    shifts, levels = None, ()
    if kind == "codebook":
        scales, levels = (2.0 ** stream.integers(-14, 4, blocks)).astype(np.float32), E2M1
    elif kind == "zero-point":
        shifts = stream.integers(0, 1 << bits, blocks).astype(np.float32)
    elif kind == "affine":
        shifts = round_to(stream.standard_normal(blocks).astype(np.float32), "f16")
    grid = Grid(bits, block, "bf16", lossless=True, kind=kind, levels=levels)
    rows = [None if part is None else part.reshape(matrix_of(part.shape)) for part in (codes, scales, shifts)]
    values = evaluate(grid, *rows).astype(np.float32).reshape(shape)
    return ArrayTensor(name, round_to(values, dtype), dtype, codes, scales, grid, shifts)


def regridded(like: Tensor, block: int, bits: int, scale_dtype: DType = "bf16") -> ArrayTensor:
    """A bf16 tensor of the same name and shape on another grid."""
    (out, width), stream = like.shape, np.random.default_rng(block + bits)
    codes = random_codes((out, width), bits, "symmetric", stream)
    scales = round_to(stream.uniform(0.001, 0.1, (out, width // block)).astype(np.float32), scale_dtype)
    values = round_to(codes * expand(scales, block), "bf16")
    return ArrayTensor(like.name, values, "bf16", codes, scales, Grid(bits, block, scale_dtype, lossless=True))
