"""How a matrix on a grid is stored in an ML program: which element types its codes, scales and shifts take.

The operation is `constexpr_blockwise_shift_scale` of iOS 18, scale * (data - offset): data int4, uint4, int8 or uint8,
or what another constant operation gives; scales and the result f16 or f32; offsets of the data's type, f16 or f32.
Codes of 2 bits and codebooks are places in a table (`constexpr_lut_to_dense`), one table a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.grids.search import GridTensor
from gemexport.formats.tensor import Floats, Grid, Rows, Tensor, slices

Float = Literal["fp16", "fp32"]
INDICES = (2, 3, 4, 6, 8)  # bits of a place in a table
NUMBERS: dict[str, type[np.floating]] = {"fp16": np.float16, "fp32": np.float32}


@dataclass(frozen=True)
class Form:
    """Element types, by MIL's names, of what a matrix is stored as."""

    codes: str  # of the codes, or of the places in `table`
    scales: Float  # and of the matrix that comes out
    table: NDArray | None = None  # what a place stands for
    offsets: str | None = None  # of the zero points
    biases: Float | None = None  # of what an affine grid adds to a block besides


def code_type(grid: Grid) -> str:
    """The element type of a grid's codes, or of their places in a table: those of 2 bits and of codebooks."""
    if grid.kind == "codebook":
        return next(f"uint{bits}" for bits in INDICES if bits >= grid.bits)
    if grid.bits == 2:
        return "uint2"
    return ("int" if grid.kind == "symmetric" else "uint") + ("4" if grid.bits <= 4 else "8")


def form(tensor: Tensor) -> Form:
    """The form of a tensor that has a grid; where the grid alone does not tell, its scales and shifts are read."""
    grid = tensor.grid
    assert grid is not None
    codes = code_type(grid)
    integer = codes if codes in ("uint4", "uint8") else "uint8"  # of the data that offsets are taken from
    scales, shifts = _types(tensor, grid, integer)
    if grid.kind == "codebook":
        levels = np.zeros(1 << int(codes[4:]), np.float32)
        levels[: len(grid.levels)] = grid.levels
        scales = scales if held(levels, "fp16") else "fp32"
        return Form(codes, scales, levels.astype(NUMBERS[scales]))
    table = None
    if codes == "uint2":
        table = np.arange(-2, 2, dtype=np.int8) if grid.kind == "symmetric" else np.arange(4, dtype=np.uint8)
    if grid.kind == "affine":
        rest: Float | None = None if shifts == "none" else "fp16" if shifts == "fp16" else "fp32"
        return Form(codes, scales, table, integer, rest)
    return Form(codes, scales, table, shifts if grid.kind == "zero-point" else None)


def split(grid: Grid, scales: Floats, biases: Floats) -> tuple[Floats, Floats]:
    """Zero points, and what they leave of the biases: scale * (code - zero) + rest is scale * code + bias.

    Without zero points a bias would cancel most of what the codes give, and a sum in float16 would lose as much. The
    zero is the code nearest to 0 where the rest is then a float32 number, else 0.
    """
    exact = scales.astype(np.float64)
    nearest = np.rint(np.divide(-biases, exact, out=np.zeros_like(exact), where=exact != 0))
    zeros = np.clip(nearest, 0, (1 << grid.bits) - 1)
    rest = biases + exact * zeros
    zeros = np.where(rest.astype(np.float32) == rest, zeros, 0)
    return zeros.astype(np.float32), (biases + exact * zeros).astype(np.float32)


def _types(tensor: Tensor, grid: Grid, integer: str) -> tuple[Float, str]:
    """The narrowest element types that hold every scale, and every zero point or what is left of every bias."""
    scales: list[Float] = ["fp16", "fp32"]
    shifts = {"zero-point": [integer, "fp16", "fp32"], "affine": ["none", "fp16", "fp32"]}.get(grid.kind, ["none"])
    if shifts == ["none"] and grid.scale_dtype == "f16":
        return "fp16", "none"
    for rows in _beside(tensor):
        assert rows.scales is not None
        while not held(rows.scales, scales[0]):
            scales.pop(0)
        if rows.shifts is not None:
            beside = split(grid, rows.scales, rows.shifts)[1] if grid.kind == "affine" else rows.shifts
            while not held(beside, shifts[0]):
                shifts.pop(0)
        if len(scales) == len(shifts) == 1:
            break
    return scales[0], shifts[0]


def _beside(tensor: Tensor) -> Iterator[Rows]:
    """A tensor's rows for the sake of their scales and shifts; of a lattice that was found, nothing else is read."""
    for start, stop in row_slices(tensor):
        if isinstance(tensor, GridTensor):
            yield Rows(np.empty((0, 0), np.float32), scales=tensor.scales(start, stop))
        else:
            yield tensor.rows(start, stop)


def row_slices(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about 16 MiB as float32, whose codes fill whole bytes whatever their width."""
    return slices(tensor, multiple=8)


def held(values: NDArray[np.floating], kind: str) -> bool:
    """Whether an element type holds every value as it is; `none` is a type for zeros."""
    if kind == "none":
        return not values.any()
    if kind.startswith("uint"):
        return bool(((values >= 0) & (values < 1 << int(kind[4:])) & (values == np.rint(values))).all())
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(NUMBERS[kind]).astype(values.dtype), values, equal_nan=True)


def halves(values: Floats) -> NDArray[np.float16]:
    """Float32 values rounded to float16, ties to even."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)
