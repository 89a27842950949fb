"""How quantized weights lie in ONNX tensors: byte layouts, and tensors that are read through them.

Two layouts hold the same codes: the unsigned one of ONNX Runtime's fused operators, and the signed INT2, INT4 and
INT8 tensors of the ONNX standard.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.storage.bitpack import fields
from gemexport.formats.tensor import Codes, DType, Floats, Grid, Kind, Rows, TensorBase, from_bf16, matrix_of, on_grid

Bytes = NDArray[np.uint8]


def pack(codes: Codes, bits: int) -> Bytes:
    """Codes `[…, n]` as MatMulNBits and GatherBlockQuantized hold them: uint8 `[…, n * bits / 8]`.

    Code + 2**(bits-1), so that zero lies at the operators' default zero point; the first code in the lowest bits
    (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits).
    """
    return _join(codes.view(np.uint8) + np.uint8(1 << (bits - 1)), bits)


def unpack(packed: Bytes, bits: int) -> Codes:
    """The inverse of `pack`: int8 `[…, n]` in [-2**(bits-1), 2**(bits-1) - 1]."""
    return (fields(packed, bits) - np.uint8(1 << (bits - 1))).view(np.int8)


def pack_signed(codes: Codes, bits: int) -> Bytes:
    """Codes `[…, n]` as INT2, INT4 and INT8 tensors hold them: two's complement, the first in the lowest bits.

    A tensor is packed as one run, so n must fill whole bytes (onnx.proto, TensorProto.DataType).
    """
    return _join(codes.view(np.uint8) & np.uint8(0xFF >> (8 - bits)), bits)


def unpack_signed(packed: Bytes, bits: int) -> Codes:
    """The inverse of `pack_signed`."""
    half = np.uint8(1 << (bits - 1))
    return ((fields(packed, bits) ^ half) - half).view(np.int8)


def pack_unsigned(codes: Bytes, bits: int) -> Bytes:
    """Codes `[…, n]` in [0, 2**bits - 1] as they are, the first in the lowest bits; zeros fill the last byte."""
    return _join(codes, bits)


def unpack_unsigned(packed: Bytes, bits: int) -> Bytes:
    """The fields of UINT2, UINT4 and UINT8 tensors, `[…, n]` in [0, 2**bits - 1]."""
    return fields(packed, bits)


def _join(numbers: Bytes, bits: int) -> Bytes:
    per = 8 // bits
    if numbers.shape[-1] % per:
        numbers = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, -numbers.shape[-1] % per)])
    packed = numbers[..., 0::per].copy()
    for place in range(1, per):
        packed |= numbers[..., place::per] << np.uint8(place * bits)
    return packed


class StoredTensor(TensorBase):
    """A float tensor as it is or transposed; `array` is mapped, bf16 as its bit patterns (uint16)."""

    grid: Grid | None = None

    def __init__(self, name: str, array: NDArray[Any], transposed: bool = False, *, requantized: bool = False) -> None:
        self.name, self.requantized = name, requantized  # whether it is stored as integers fitted to its values
        self.array = array.T if transposed else array
        self.shape: tuple[int, ...] = self.array.shape or (1,)
        self.dtype: DType = float_dtype(array)

    def rows(self, start: int, stop: int) -> Rows:
        return Rows(to_floats(self.array.reshape(matrix_of(self.shape))[start:stop]))

    def columns(self, start: int, stop: int) -> StoredTensor:
        """Columns `start` to `stop` of a matrix as one of their own."""
        return StoredTensor(self.name, self.array[:, start:stop])

    def numpy(self) -> Floats:
        return to_floats(self.array).reshape(self.shape)


class PackedTensor(TensorBase):
    """A tensor `[out, in]` of codes and scales: value = (code - zero point) * scale.

    `packed` is `[out, in * bits / 8]` with scales `[out, blocks]`, or transposed `[in, out * bits / 8]` with scales
    `[blocks, out]`. Zero points, float32 in the shape of the scales, are counted from the middle of the code range:
    none, or all zero, make a grid that is symmetric; those that are no integers of that range make no grid.
    """

    dtype: DType = "f32"

    def __init__(
        self,
        name: str,
        packed: Bytes,
        scales: NDArray[Any],
        bits: int,
        *,
        signed: bool,
        transposed: bool,
        zero_points: Floats | None = None,
    ) -> None:
        self.name, self.packed, self.scales, self.bits = name, packed, scales, bits
        self.signed, self.transposed = signed, transposed
        wide = packed.shape[1] * 8 // bits
        self.shape: tuple[int, ...] = (wide, packed.shape[0]) if transposed else (packed.shape[0], wide)
        self.block = self.shape[1] // scales.shape[0 if transposed else 1]
        self.middle = 1 << (bits - 1)
        self.zero_points = None
        if zero_points is not None and zero_points.any():
            self.zero_points = zero_points + np.float32(self.middle)
        kind: Kind = "symmetric" if self.zero_points is None else "zero-point"
        self._stored = Grid(bits, self.block, float_dtype(scales), True, kind)
        self.grid = self._stored if self.zero_points is None or self._codes(self.zero_points) else None

    def columns(self, start: int, stop: int) -> PackedTensor:
        """Columns `start` to `stop` as a matrix of their own; whole blocks of one that is stored transposed."""
        if not self.transposed or start % self.block or stop % self.block:
            raise ValueError(f"{self.name}: columns {start} to {stop} are not stored as rows of whole blocks")
        blocks = slice(start // self.block, stop // self.block)
        return PackedTensor(
            self.name,
            self.packed[start:stop],
            self.scales[blocks],
            self.bits,
            signed=self.signed,
            transposed=True,
            zero_points=None if self.zero_points is None else self.zero_points[blocks] - np.float32(self.middle),
        )

    def _codes(self, zeros: Floats) -> bool:
        """Whether zero points are integers that a code could be."""
        return bool(((zeros == np.rint(zeros)) & (zeros >= 0) & (zeros < 2 * self.middle)).all())

    def rows(self, start: int, stop: int) -> Rows:
        inverse = unpack_signed if self.signed else unpack
        if self.transposed:
            per = 8 // self.bits
            first = start // per
            columns = inverse(np.ascontiguousarray(self.packed[:, first : -(-stop // per)]), self.bits)
            codes = np.ascontiguousarray(columns[:, start - first * per : stop - first * per].T)
        else:
            codes = inverse(np.ascontiguousarray(self.packed[start:stop]), self.bits)
        scales = to_floats(self._part(self.scales, start, stop))
        if self.zero_points is None:
            return on_grid(self._stored, codes, scales)
        # Wraps around: the middle of the signed codes is the middle of the unsigned ones.
        unsigned = codes.view(np.uint8) + np.uint8(self.middle)
        zeros = self._part(self.zero_points, start, stop)
        rows = on_grid(self._stored, unsigned, scales, zeros)
        return rows if self.grid is not None else Rows(rows.values)

    def _part(self, array: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
        return np.ascontiguousarray(array[:, start:stop].T) if self.transposed else array[start:stop]


def float_dtype(array: NDArray[Any]) -> DType:
    """The dtype that an array of floats stands for; uint16 holds the bit patterns of bf16."""
    return "bf16" if array.dtype == np.uint16 else "f16" if array.dtype == np.float16 else "f32"


def to_floats(array: NDArray[Any]) -> Floats:
    """Float32 values of an array of f32, f16 or the bit patterns of bf16."""
    return from_bf16(array) if array.dtype == np.uint16 else np.asarray(array, dtype=np.float32)
