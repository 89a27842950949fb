"""Which scheme of compressed-tensors holds a grid, and the arrays that a module has in each of them.

The formats are those of compressed_tensors.compressors 0.20: integers as dense bits or a byte each, fp4 and fp6 in
bytes, fp8 as is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.exporters.streaming import Column, Rounding
from gemexport.formats.storage.bitpack import pack, words, zero_code
from gemexport.formats.storage.minifloat import E2M1, E2M3, E4M3, multiple, to_e4m3, to_e8m0
from gemexport.formats.storage.safetensors import DTYPE_NAMES, Entry
from gemexport.formats.tensor import Floats, Grid, Rows, Tensor, reblock, slices

PACKED, BYTES, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
MXFP4, MXFP6, NVFP4 = "mxfp4-pack-quantized", "mxfp6-pack-quantized", "nvfp4-pack-quantized"
MX = {MXFP4: E2M1, MXFP6: E2M3}
MX_GROUP, NV_GROUP = 32, 16
NARROWEST = 16  # weights that share a scale: with fewer, the scales would outweigh the codes


Integers = tuple[()] | tuple[int, bool]  # bits of an activation, and whether around a zero point of 0; (): none


def activation_args(bits: int, symmetric: bool) -> dict[str, Any]:
    """Static integers for a whole activation, as compressed_tensors.quantization.QuantizationArgs serialises them."""
    return {
        "dynamic": False,
        "num_bits": bits,
        "observer": "static_minmax",
        "strategy": "tensor",
        "symmetric": symmetric,
        "type": "int",
    }


@dataclass(frozen=True, order=True)
class Scheme:
    """How a module is quantized, as config.json says it."""

    format: str
    bits: int
    group: int  # consecutive weights that share a scale; 0: a whole row
    symmetric: bool = True
    input: Integers = ()
    output: Integers = ()

    def group_config(self, targets: list[str]) -> dict[str, Any]:
        """A config group, as compressed_tensors.quantization.QuantizationScheme serialises it."""
        strategy = "group" if self.group else "channel"
        weights: dict[str, Any] = {
            "dynamic": False,
            "group_size": self.group or None,
            "num_bits": self.bits,
            "strategy": "tensor_group" if self.format == NVFP4 else strategy,
            "symmetric": self.symmetric,
            "type": "int" if self.format in (PACKED, BYTES) else "float",
        }
        if self.format in MX:
            weights["scale_dtype"] = "torch.uint8"
        if self.format == NVFP4:
            weights["scale_dtype"] = "torch.float8_e4m3fn"
        return {
            "format": self.format,
            "input_activations": activation_args(*self.input) if self.input else None,
            "output_activations": activation_args(*self.output) if self.output else None,
            "targets": targets,
            "weights": weights,
        }

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor's codes and scales fit, with bits to spare and zero points in the middle if need be."""
        grid = tensor.grid
        assert grid is not None
        group = self.group or tensor.shape[1]
        own = scheme_of(grid, tensor.shape[1])
        return (
            isinstance(own, Scheme)
            and own.format == self.format
            and (own.bits == self.bits or (self.format == PACKED and own.bits < self.bits))
            and own.symmetric >= self.symmetric
            and grid.block % group == 0
        )

    def in_bytes(self) -> Scheme | None:
        """The scheme with a byte for each code, so that modules have a `weight`; None where there is none."""
        if self.format == PACKED and self.symmetric:
            return replace(self, format=BYTES)
        return self if self.format == FLOAT else None

    @property
    def byte_scales(self) -> bool:
        """Whether a scale has one byte, so that loaders do not cast it."""
        return self.format in MX or self.format == NVFP4


def scheme_of(grid: Grid, width: int) -> Scheme | str:
    """The scheme that holds a grid in rows of `width` weights; else why none does."""
    group = grid.block if grid.block < width else 0
    if grid.block < min(NARROWEST, width):
        return f"groups of {grid.block} weights are no use: there would be more scales than codes"
    if grid.kind == "vectors":
        return f"there is no scheme for {grid.codec}"
    if grid.kind == "affine":
        return "biases that are no multiples of their scales have no place"
    if grid.kind != "codebook":
        return Scheme(PACKED, grid.bits, group, grid.kind == "symmetric")
    if multiple(grid.levels, E4M3) == 1:
        return Scheme(FLOAT, grid.bits, group)
    # Scales of one byte: no grid says that they are, but no format writes others.
    for form, levels in MX.items():
        factor = multiple(grid.levels, levels)
        if factor is not None and np.frexp(factor)[0] == 0.5 and grid.block % MX_GROUP == 0:
            return Scheme(form, grid.bits, MX_GROUP)
    if multiple(grid.levels, E2M1) is not None and grid.block % NV_GROUP == 0:
        return Scheme(NVFP4, grid.bits, NV_GROUP)
    return f"there is no scheme for {grid.bits}-bit codes of the kind codebook with blocks of {grid.block}"


def holds_scales(tensor: Tensor, scheme: Scheme) -> bool:
    """Whether the scheme has every scale of a tensor on a codebook: those of some have one byte."""
    grid = tensor.grid
    assert grid is not None
    return not scheme.byte_scales or all(
        _bytes(tensor.rows(*bounds), grid, scheme) is not None for bounds in slices(tensor)
    )


def codes(tensor: Tensor, scheme: Scheme) -> tuple[Entry, Callable[[Rows], NDArray[Any]]]:
    """The array of a module's codes, and what it holds of rows."""
    (out, width), module = tensor.shape, tensor.name.removesuffix(".weight")
    if scheme.format == FLOAT:
        return Entry(tensor.name, "F8_E4M3", (out, width)), lambda rows: rows.grid()[0].view(np.uint8)
    if scheme.format == BYTES:
        return Entry(tensor.name, "I8", (out, width)), lambda rows: rows.grid()[0]
    if scheme.format == PACKED:
        entry = Entry(f"{module}.weight_packed", "I32", (out, words(width, scheme.bits)))
        return entry, lambda rows: pack(rows.grid()[0], scheme.bits).view("<i4")
    entry = Entry(f"{module}.weight_packed", "U8", (out, width * scheme.bits // 8))
    return entry, lambda rows: pack(rows.grid()[0], scheme.bits).view(np.uint8)


def columns(tensor: Tensor, scheme: Scheme, rounding: Rounding) -> Iterator[Column]:
    """What stands beside a tensor's codes; `rounding` is told the scales that its dtype does not hold."""
    grid, (out, width), module = tensor.grid, tensor.shape, tensor.name.removesuffix(".weight")
    assert grid is not None
    group = scheme.group or width
    shape, scale = (out, width // group), f"{module}.weight_scale"
    if scheme.byte_scales:
        dtype = "U8" if scheme.format in MX else "F8_E4M3"
        yield Column(Entry(scale, dtype, shape), lambda rows: _exactly(_bytes(rows, grid, scheme)))
        return
    exact = rounding.dtype in (grid.scale_dtype, "f32")
    yield Column(
        Entry(scale, DTYPE_NAMES[rounding.dtype], shape),
        lambda rows: rounding.store(_regrouped(rows.scales, grid, group), exact),
    )
    if not scheme.symmetric:
        yield Column(
            Entry(f"{module}.weight_zero_point", "I32", (words(out, scheme.bits), shape[1])),
            lambda rows: _regrouped(_zero_points(rows, scheme), grid, group).astype(np.uint8),
            lambda zeros: _packed_down(zeros, scheme.bits),
        )


def constants(tensor: Tensor, scheme: Scheme) -> Iterator[tuple[Entry, NDArray[Any]]]:
    """Arrays of a module that are known before its rows are read."""
    module, grid = tensor.name.removesuffix(".weight"), tensor.grid
    assert grid is not None
    if scheme.format == PACKED:
        yield Entry(f"{module}.weight_shape", "I64", (2,)), np.array(tensor.shape, dtype="<i8")
    if scheme.format == NVFP4:
        factor = multiple(grid.levels, E2M1)
        assert factor is not None
        yield Entry(f"{module}.weight_global_scale", "F32", (1,)), np.array([1 / factor], dtype="<f4")


def _zero_points(rows: Rows, scheme: Scheme) -> Floats:
    """Zero points `[rows, blocks]`: those of a symmetric grid are in the middle of the scheme's codes."""
    assert rows.scales is not None
    return np.full_like(rows.scales, zero_code(scheme.bits)) if rows.shifts is None else rows.shifts


def _packed_down(zeros: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Unsigned zero points `[rows, groups]` packed down the columns, as the library packs them."""
    return np.ascontiguousarray(pack(np.ascontiguousarray(zeros.T), bits).view("<i4").T)


def _bytes(rows: Rows, grid: Grid, scheme: Scheme) -> NDArray[np.uint8] | None:
    """The scales of rows in one byte each; None when they are not of that kind."""
    scales = _regrouped(rows.scales, grid, scheme.group)
    if scheme.format == NVFP4:
        return to_e4m3(scales)  # the levels have the global scale in them
    factor = multiple(grid.levels, MX[scheme.format])
    assert factor is not None
    return to_e8m0(scales * np.float32(factor))


def _exactly(stored: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    assert stored is not None  # `holds_scales` was asked
    return stored


def _regrouped(values: Floats | None, grid: Grid, group: int) -> Floats:
    assert values is not None
    grouped = reblock(values, grid.block, group)
    assert grouped is not None
    return grouped
