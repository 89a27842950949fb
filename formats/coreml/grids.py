"""Which grid a quantized constant of an ML program lies on, and its codes, scales and shifts in the middle form.

Core ML stores codes signed or unsigned, as they are or as places in a table, with an offset or without; here all of
that becomes one of the four kinds of `formats/tensor.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.coreml.arrays import Array, Below, Palette, ShiftScale, Stored
from gemexport.formats.coreml.blob import TYPES
from gemexport.formats.pieces import Pieces, whole
from gemexport.formats.storage.bitpack import Unsigned, signed, zero_code
from gemexport.formats.tensor import DType, Floats, Grid, Kind, Rows, Tensor, TensorBase, on_grid


@dataclass(frozen=True)
class Coding:
    """What the codes of a constant mean: unsigned ones, counted from `base`."""

    bits: int
    base: int  # the unsigned code that stands for 0 where there is no offset
    table: NDArray | None = None  # of a codebook, by code


def coding(data: Array) -> Coding | None:
    """What the codes in `data` mean; None when they are floats, single bits, or come from several tables."""
    if isinstance(data, Palette):
        return _tabled(data)
    kind = TYPES[data.kind]
    if kind.name not in ("int4", "uint4", "int8", "uint8"):
        return None
    return Coding(kind.bits, zero_code(kind.bits) if kind.name.startswith("int") else 0)


def _tabled(data: Palette) -> Coding | None:
    """A palette of numbers with one table for the whole matrix; a table of consecutive integers is plain codes."""
    bits = TYPES[data.indices.kind].bits
    if bits < 2 or data.lut.shape != (*[1] * len(data.shape), 1 << bits, 1):
        return None
    table = data.lut.numpy().reshape(-1).astype(np.float64)
    for base in (zero_code(bits), 0):
        if np.array_equal(table, np.arange(1 << bits) - base):
            return Coding(bits, base)
    return Coding(bits, 0, table)


class CodedTensor(TensorBase):
    """A matrix of codes and scales, and of the biases beside them where it has some."""

    def __init__(self, name: str, array: ShiftScale, meaning: Coding, kind: Kind, biases: Array | None) -> None:
        self.name, self.shape = name, array.shape
        self.dtype: DType = "f16" if array.kind == "fp16" else "f32"
        self._array, self._coding, self._biases = array, meaning, biases
        kinds = {array.kind} if biases is None else {array.kind, biases.kind}
        table = () if meaning.table is None else tuple(meaning.table.tolist())
        dtype: DType = "f16" if kinds == {"fp16"} else "f32"
        self.grid = Grid(meaning.bits, array.shape[1] // array.scale.shape[1], dtype, True, kind, table)

    def rows(self, start: int, stop: int) -> Rows:
        codes = self._codes(start, stop)
        scales = np.ascontiguousarray(self._array.scales(start, stop), np.float32)
        if self.grid.kind == "symmetric":
            return on_grid(self.grid, signed(codes, self.grid.bits), scales)
        shifts: Floats | None = None
        if self.grid.kind != "codebook":
            shifts = zeros(self._array, self._coding, start, stop)
        if shifts is not None and self._biases is not None:
            shifts = whole_biases(scales, shifts, self._biases.rows(start, stop))
        return on_grid(self.grid, codes, scales, shifts)

    def _codes(self, start: int, stop: int) -> Unsigned:
        data = self._array.data
        if isinstance(data, Palette):
            return np.asarray(data.indices.rows(start, stop), np.uint8)
        found = data.rows(start, stop)
        return (found.view(np.uint8) + np.uint8(self._coding.base)) if found.dtype == np.int8 else np.asarray(found)


def zeros(array: ShiftScale, meaning: Coding, start: int, stop: int) -> Floats:
    """The unsigned code that stands for 0 in each block of these rows, `[rows, in // block]`."""
    offsets = array.offsets(start, stop)
    if offsets is None:
        return np.full((stop - start, array.scale.shape[1]), np.float32(meaning.base))
    return np.ascontiguousarray(offsets, np.float32) + np.float32(meaning.base)


def whole_biases(scales: Floats, places: Floats, rest: Floats) -> Floats:
    """The biases of an affine grid, of which zero points take a part: rest - scale * zero."""
    return np.asarray(rest - scales.astype(np.float64) * places, np.float32)


def coded(name: str, array: Array, biases: Array | None) -> CodedTensor | None:
    """The matrix `array` as a tensor on its grid, `biases` `[out, in // block]` added to its blocks.

    None when it is none: no matrix, no codes, or shifts that are no code's place. Offsets and biases are read to tell
    which kind of grid it is, codes are not.
    """
    if not isinstance(array, ShiftScale) or len(array.shape) != 2 or (meaning := coding(array.data)) is None:
        return None
    kind = _kind(array, meaning, biases)
    return None if kind is None else CodedTensor(name, array, meaning, kind, biases if kind == "affine" else None)


def stack(name: str, array: Array, biases: Array | None) -> Tensor | None:
    """As `coded`, of a matrix or of several in one constant of three axes, each row with scales of its own."""
    leading = array.shape[:-1]
    if not isinstance(array, ShiftScale) or len(leading) < 2:
        return coded(name, array, biases)
    beside = [part for part in (array.scale, array.offset, biases) if part is not None]
    if any(part.shape[:-1] != leading for part in beside):
        return None
    data = array.data
    if isinstance(data, Palette) and data.lut.shape == (*[1] * len(array.shape), *data.lut.shape[-2:]):
        table = Stored(
            data.lut.kind, (1, 1, *data.lut.shape[-2:]), data.lut.numpy().reshape(1, 1, *data.lut.shape[-2:])
        )
        flat: Array = Palette(Below(data.indices), table, None)
    else:
        flat = Below(data)
    offset = None if array.offset is None else Below(array.offset)
    found = coded(name, ShiftScale(flat, Below(array.scale), offset), None if biases is None else Below(biases))
    return None if found is None else Pieces(name, array.shape, [whole(found)])


def _kind(array: ShiftScale, meaning: Coding, biases: Array | None) -> Kind | None:
    if meaning.table is not None:
        return "codebook" if array.offset is None and biases is None else None
    if biases is not None and biases.shape != (array.shape[0], array.scale.shape[1]):
        return None
    middle = np.float32(zero_code(meaning.bits))
    if array.offset is None and biases is None:
        return "symmetric" if meaning.base == middle else "zero-point"
    symmetric = True
    step = max(1, (4 << 20) // array.scale.shape[1])
    for start in range(0, array.shape[0], step):
        stop = min(start + step, array.shape[0])
        places = zeros(array, meaning, start, stop)
        if not np.array_equal(places, np.rint(places)):
            return None
        if biases is None:
            symmetric = symmetric and bool((places == middle).all())
        elif symmetric:
            scales = array.scales(start, stop)
            symmetric = np.array_equal(whole_biases(scales, places, biases.rows(start, stop)), -middle * scales)
    if symmetric:
        return "symmetric"
    return "zero-point" if biases is None else "affine"
