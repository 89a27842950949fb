"""Which of MLX's quantization modes holds a grid, and the numbers that stand beside the codes in each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.exporters.streaming import Column, Rounding
from gemexport.formats.mlx import BITS, FLOAT_MODES, FloatMode, group_for
from gemexport.formats.storage.bitpack import pack, zero_code
from gemexport.formats.storage.minifloat import multiple, to_e4m3, to_e8m0
from gemexport.formats.storage.safetensors import DTYPE_NAMES, Entry
from gemexport.formats.tensor import DType, Floats, Grid, Rows, Tensor, reblock, slices


@dataclass(frozen=True)
class Mode:
    """How a tensor is quantized, as config.json says it."""

    name: str
    bits: int
    group: int

    def settings(self) -> dict[str, Any]:
        """What stands in config.json."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.name}

    def words(self, rows: Rows) -> NDArray[np.uint32]:
        """The codes of rows as the file holds them."""
        return pack(rows.grid()[0], self.bits)


def mode_of(grid: Grid, width: int) -> Mode | str:
    """The mode that holds a grid in rows of `width` weights; else why none does."""
    if grid.kind == "codebook":
        return _float_mode(grid, width)
    if grid.kind == "vectors":
        return f"MLX has no mode for {grid.codec}"
    group = group_for(grid.block, width)
    if group is None:
        return f"MLX has no group for blocks of {grid.block} weights"
    # The narrowest width there is: codes of 7 bits have room in 8.
    bits = next((bits for bits in BITS if bits >= grid.bits), None)
    if bits is None:
        return f"MLX has no codes of {grid.bits} bits"
    return Mode("affine", bits, group)


def _float_mode(grid: Grid, width: int) -> Mode | str:
    """The mode with these levels. Its scales are a byte: no grid says that they are, but no format writes others.

    With fp8 some do, and then blocks of 32 with bf16 scales mean mxfp8.
    """
    refused = f"MLX has no mode for {grid.bits}-bit codes of the kind codebook with blocks of {grid.block}"
    for mode in FLOAT_MODES:
        factor = multiple(grid.levels, mode.levels)
        fits = grid.block == mode.group if mode.bits == 8 else grid.block % mode.group == 0
        if factor is None or not fits or width % mode.group or grid.scale_dtype != "bf16":
            continue
        if np.frexp(factor)[0] == 0.5 if mode.e8m0 else factor == 1:
            return Mode(mode.name, mode.bits, mode.group)
    return refused


def holds_scales(tensor: Tensor, mode: Mode) -> bool:
    """Whether the mode has every scale of a tensor on a codebook: its scales have one byte."""
    grid = tensor.grid
    assert grid is not None
    form = _form(mode)
    return form is None or all(_bytes(tensor.rows(*bounds), grid, form) is not None for bounds in slices(tensor))


def columns(tensor: Tensor, mode: Mode, rounding: Rounding) -> Iterator[Column]:
    """What stands beside a tensor's codes; `rounding` is told the scales and biases that its dtype does not hold."""
    grid, (*leading, width), module = tensor.grid, tensor.shape, tensor.name.removesuffix(".weight")
    assert grid is not None
    shape, form = (*leading, width // mode.group), _form(mode)
    if form is not None:
        mini = form  # a name that is never None
        yield Column(Entry(f"{module}.scales", "U8", shape), lambda rows: _exactly(_bytes(rows, grid, mini)))
        return
    held = rounding.dtype == "f32" or grid.scale_dtype == rounding.dtype
    dtype = DTYPE_NAMES[rounding.dtype]
    yield Column(
        Entry(f"{module}.scales", dtype, shape),
        lambda rows: rounding.store(_regrouped(rows.scales, grid, mode), held),
    )
    # A power of two times a scale is as exact as the scale; a bias of the file's own has the scale's dtype at most.
    sure = held and grid.kind != "zero-point"
    yield Column(
        Entry(f"{module}.biases", dtype, shape),
        lambda rows: rounding.store(_regrouped(_biases(rows, grid, mode), grid, mode), sure),
    )


def _biases(rows: Rows, grid: Grid, mode: Mode) -> Floats | NDArray[np.float64]:
    """`bias` in w = scale * code + bias, `[rows, blocks]`, without rounding."""
    assert rows.scales is not None
    if grid.kind == "symmetric":
        return -zero_code(mode.bits) * rows.scales
    assert rows.shifts is not None
    if grid.kind == "affine":
        return rows.shifts
    return -rows.shifts.astype(np.float64) * rows.scales


def default_scales(tensor: Tensor, model: DType) -> DType:
    """The narrowest of bf16 and f32 that holds a tensor's scales and biases, or the values of a plain one.

    Never f16, in which Gemma's activations overflow. Scales of a tensor that was rounded to its grid have no value to
    keep: the grid is as good with those of the model's dtype.
    """
    grid = tensor.grid
    if grid is None:
        return "bf16" if tensor.dtype == "bf16" else "f32"
    if grid.kind == "codebook":
        return "bf16"
    needed = ("f32" if grid.kind == "zero-point" else grid.scale_dtype) if grid.lossless else model
    return "bf16" if needed == "bf16" else "f32"


def _form(mode: Mode) -> FloatMode | None:
    return next((form for form in FLOAT_MODES if form.name == mode.name), None)


def _bytes(rows: Rows, grid: Grid, form: FloatMode) -> NDArray[np.uint8] | None:
    """The scales of rows as the mode stores them; None when it cannot."""
    factor = multiple(grid.levels, form.levels)
    assert rows.scales is not None
    assert factor is not None
    grouped = reblock(rows.scales * np.float32(factor), grid.block, form.group)
    assert grouped is not None
    return to_e8m0(grouped) if form.e8m0 else to_e4m3(grouped)


def _exactly(stored: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    assert stored is not None  # `holds_scales` was asked
    return stored


def _regrouped(values: Any, grid: Grid, mode: Mode) -> Any:
    assert values is not None
    grouped = reblock(values, grid.block, mode.group)
    assert grouped is not None
    return grouped
