"""The constants of an ML program as arrays read by rows: stored ones, and quantized ones that dequantize on the way.

Rows run along the first axis. Floats come as float32, with no rounding of what a scale times a code gives; a runtime
rounds that product to the scale's type, which is the evaluator's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.coreml.blob import Blob
from gemexport.formats.grids.lattice import jit
from gemexport.formats.tensor import Floats, from_bf16, matrix_of


class Array(Protocol):
    """A constant: MIL element type, shape, and its elements when asked."""

    @property
    def kind(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> NDArray:
        """`[stop - start, …]` along the first axis; floats as float32, others in their own type."""
        ...

    def numpy(self) -> NDArray:
        """The whole array."""
        ...


def matrix_rows(array: Array, start: int, stop: int) -> NDArray:
    """Rows `start` to `stop` of the last axis, `[rows, width]`, the axes before it counted as one."""
    count, width = matrix_of(array.shape)
    if len(array.shape) < 2:
        return array.numpy().reshape(count, width)[start:stop]
    share = count // array.shape[0] if count else 1  # rows of an element along the first axis
    first = start // share
    found = array.rows(first, -(-stop // share)).reshape(-1, width)
    return found[start - first * share : stop - first * share]


class Below:
    """An array of several axes as a matrix `[rows, width]`: one below the other."""

    def __init__(self, base: Array) -> None:
        self.kind, self.shape, self._base = base.kind, matrix_of(base.shape), base

    def rows(self, start: int, stop: int) -> NDArray:
        return matrix_rows(self._base, start, stop)

    def numpy(self) -> NDArray:
        return self._base.numpy().reshape(self.shape)


@jit
def _of_nibbles(packed: NDArray[np.uint8], flip: int, scales: Floats, offsets: Floats, values: Floats) -> None:
    """`scale * (code - offset)` of codes of four bits, two a byte, the low ones first; one scale a block, all flat.

    `flip` is 8 for codes in two's complement, else 0. In one go: what is unpacked and widened one after the other is
    written to memory and read from it six times. Numbers of 32 bits and views of a block make it a vectorised loop.
    """
    half, four, mask, sign = packed.size // scales.size, np.int32(4), np.int32(15), np.int32(flip)
    for block in range(scales.size):
        scale, offset = scales[block], offsets[block]
        codes = packed[block * half : (block + 1) * half]
        found = values[2 * block * half : 2 * (block + 1) * half]
        for i in range(half):
            byte = np.int32(codes[i])
            found[2 * i] = (np.float32(((byte & mask) ^ sign) - sign) - offset) * scale
            found[2 * i + 1] = (np.float32(((byte >> four) ^ sign) - sign) - offset) * scale


def _plain(elements: NDArray, kind: str) -> NDArray:
    if kind == "bf16":
        return from_bf16(elements)
    return elements.astype(np.float32) if kind in ("fp16", "fp64") else elements


class Stored:
    """Elements as they are stored, mapped or in memory."""

    def __init__(self, kind: str, shape: tuple[int, ...], source: Blob | NDArray) -> None:
        self.kind, self.shape, self._source = kind, shape, source
        self._width = int(np.prod(shape[1:], dtype=np.int64))

    def rows(self, start: int, stop: int) -> NDArray:
        if isinstance(self._source, np.ndarray):
            return _plain(self._source[start:stop], self.kind)
        elements = self._source.elements(start * self._width, (stop - start) * self._width)
        return _plain(elements, self.kind).reshape(stop - start, *self.shape[1:])

    def nibbles(self, start: int, stop: int) -> tuple[NDArray[np.uint8], bool] | None:
        """The bytes of these rows of codes of four bits, and whether these are signed; None for anything else."""
        source = self._source
        if isinstance(source, np.ndarray) or source.kind.bits != 4 or self._width % 2:
            return None
        return source.data[start * self._width // 2 : stop * self._width // 2], source.kind.signed

    def numpy(self) -> NDArray:
        if isinstance(self._source, np.ndarray):
            return _plain(self._source, self.kind)
        return self.rows(0, self.shape[0])


def spread(array: Array, shape: Sequence[int]) -> Array:
    """A small array broadcast (from a scalar) or reshaped to `shape`."""
    values = array.numpy()
    whole = values.reshape(tuple(shape)) if values.size > 1 else np.broadcast_to(values.reshape(-1)[0], tuple(shape))
    return Stored(array.kind, tuple(shape), whole)


def _repeated(values: NDArray, shape: tuple[int, ...], axes: range) -> NDArray:
    for axis in axes:
        if values.shape[axis] != shape[axis]:
            values = np.repeat(values, shape[axis] // values.shape[axis], axis=axis)
    return values


class ShiftScale:
    """`scale * (data - offset)` of constexpr_blockwise_shift_scale; blocks along any axis, `data`'s size a multiple.

    A scale shared by many rows is expanded for the rows at hand only.
    """

    def __init__(self, data: Array, scale: Array, offset: Array | None = None) -> None:
        self.kind, self.shape = scale.kind, data.shape
        self.data, self.scale, self.offset = data, scale, offset

    def _of_rows(self, array: Array, start: int, stop: int) -> NDArray:
        """`scale` or `offset` for these rows, `[stop - start, blocks…]`."""
        share = self.shape[0] // array.shape[0]
        first = start // share
        values = array.rows(first, -(-stop // share))
        return np.repeat(values, share, axis=0)[start - first * share : stop - first * share] if share > 1 else values

    def scales(self, start: int, stop: int) -> NDArray:
        """The scales of these rows, one a block: `[stop - start, blocks…]`, float32."""
        return self._of_rows(self.scale, start, stop)

    def offsets(self, start: int, stop: int) -> NDArray | None:
        """The offsets of these rows, one a block, in their own type."""
        return None if self.offset is None else self._of_rows(self.offset, start, stop)

    def rows(self, start: int, stop: int) -> NDArray:
        offsets, scales = self.offsets(start, stop), self.scales(start, stop)
        if (packed := self._packed(start, stop, scales, offsets)) is not None:
            (codes, signed), found = packed, np.empty((stop - start, *self.shape[1:]), np.float32)
            shifts = (np.zeros(scales.shape, np.float32) if offsets is None else offsets.astype(np.float32)).reshape(-1)
            _of_nibbles(codes, 8 if signed else 0, np.ascontiguousarray(scales).reshape(-1), shifts, found.reshape(-1))
            return found
        values = self.data.rows(start, stop).astype(np.float32)
        axes = range(1, values.ndim)
        if offsets is not None:
            values -= _repeated(offsets.astype(np.float32), values.shape, axes)
        if values.ndim == 2 and scales.shape[1] != values.shape[1]:
            # The common case, one scale for consecutive weights of a row, without an expanded copy of the scales.
            blocks = values.reshape(*scales.shape, -1)
            blocks *= scales[..., None]
            return values
        values *= _repeated(scales, values.shape, axes)
        return values

    def _packed(
        self, start: int, stop: int, scales: NDArray, offsets: NDArray | None
    ) -> tuple[NDArray[np.uint8], bool] | None:
        """The bytes of codes of four bits whose blocks lie along rows, as `nibbles`; None where they do not."""
        if not isinstance(self.data, Stored) or len(self.shape) != 2 or stop <= start or not scales.size:
            return None
        if scales.dtype != np.float32 or self.shape[1] % (2 * scales.shape[1]):
            return None
        if offsets is not None and offsets.shape != scales.shape:
            return None
        return self.data.nibbles(start, stop)

    def numpy(self) -> NDArray:
        return self.rows(0, self.shape[0])


class Palette:
    """`lut[index]` of constexpr_lut_to_dense: a table a group of indices; an entry is a number, or a vector that lies
    along `vector_axis` of the result.
    """

    def __init__(self, indices: Array, lut: Array, vector_axis: int | None) -> None:
        self.kind, self.indices, self.lut = lut.kind, indices, lut
        self._axis = vector_axis
        self._vector = lut.shape[-1]
        shape = list(indices.shape)
        if self._vector > 1:
            if vector_axis is None:
                raise ValueError("a palette of vectors needs a vector_axis")
            self._axis = vector_axis % len(shape)
            shape[self._axis] *= self._vector
        self.shape = tuple(shape)

    def rows(self, start: int, stop: int) -> NDArray:
        along = self._vector if self._axis == 0 and self._vector > 1 else 1
        first, last = start // along, -(-stop // along)
        found = self._lookup(first, last)
        if self._vector > 1 and self._axis is not None:
            moved = np.moveaxis(found, -1, self._axis + 1)
            found = moved.reshape(last - first if self._axis else (last - first) * along, *self.shape[1:])
        else:
            found = found[..., 0]
        return found[start - first * along : stop - first * along]

    def _lookup(self, start: int, stop: int) -> NDArray:
        """`[stop - start, …, vector]`: the entries of these rows of indices."""
        indices = self.indices.rows(start, stop)
        groups = self.lut.shape[:-2]
        if all(count == 1 for count in groups):
            whole = self.lut.numpy().reshape(self.lut.shape[-2:])
            return np.asarray(whole[indices])
        share = self.indices.shape[0] // groups[0]
        table = self.lut.rows(start // share, -(-stop // share)).reshape(-1, *self.lut.shape[-2:])
        position = np.arange(start, stop).reshape(-1, *[1] * (indices.ndim - 1)) // share - start // share
        for axis in range(1, indices.ndim):
            inner = np.arange(indices.shape[axis]) // (indices.shape[axis] // groups[axis])
            position = position * groups[axis] + inner.reshape([-1 if a == axis else 1 for a in range(indices.ndim)])
        return np.asarray(table[position, indices])

    def numpy(self) -> NDArray:
        return self.rows(0, self.shape[0])


class Sparse:
    """`nonzero` elements in row-major order where `mask` is 1, zeros elsewhere (constexpr_sparse_to_dense)."""

    def __init__(self, nonzero: Array, mask: Array) -> None:
        self.kind, self.shape = nonzero.kind, mask.shape
        self._nonzero, self._mask = nonzero, mask
        self._before: NDArray[np.int64] | None = None  # nonzero elements before each row

    def rows(self, start: int, stop: int) -> NDArray:
        if self._before is None:
            counts = [int(self._mask.rows(row, row + 1).sum()) for row in range(self.shape[0])]
            self._before = np.cumsum([0, *counts])
        there = self._mask.rows(start, stop) != 0
        found = self._nonzero.rows(int(self._before[start]), int(self._before[stop]))
        dense = np.zeros(there.shape, found.dtype)
        dense[there] = found
        return dense

    def numpy(self) -> NDArray:
        return self.rows(0, self.shape[0])


class Masked:
    """An array with zeros where `mask` is 0; of its elements, only the others are stored."""

    def __init__(self, dense: Array, mask: Array) -> None:
        self.kind, self.shape = dense.kind, dense.shape
        self._dense, self._mask = dense, mask

    def rows(self, start: int, stop: int) -> NDArray:
        values = self._dense.rows(start, stop)
        return np.where(self._mask.rows(start, stop) != 0, values, np.zeros((), values.dtype))

    def numpy(self) -> NDArray:
        return self.rows(0, self.shape[0])


class Nonzero:
    """The elements of an array where `mask` is 1, in row-major order: `[count]`, what sparse operations give."""

    def __init__(self, dense: Array, mask: Array) -> None:
        self.kind, self._dense, self._mask = dense.kind, dense, mask
        self.shape = (int(mask.numpy().astype(np.int64).sum()),)

    def rows(self, start: int, stop: int) -> NDArray:
        return self.numpy()[start:stop]

    def numpy(self) -> NDArray:
        return np.asarray(self._dense.numpy()[self._mask.numpy() != 0])

    def spread(self) -> Array:
        """All of the array, zeros where `mask` is 0."""
        return Masked(self._dense, self._mask)


def sparse(nonzero: Array, mask: Array) -> Array:
    """What `nonzero` elements at the ones of `mask` stand for, whether they are stored or come from an operation."""
    return nonzero.spread() if isinstance(nonzero, Nonzero) else Sparse(nonzero, mask)


class Spread:
    """An array whose elements are repeated along an axis, each `times` times."""

    def __init__(self, base: Array, axis: int, times: int) -> None:
        self.kind, self._base, self._times = base.kind, base, times
        self._axis = axis % len(base.shape)
        self.shape = tuple(size * times if a == self._axis else size for a, size in enumerate(base.shape))

    def rows(self, start: int, stop: int) -> NDArray:
        if self._axis:
            return np.repeat(self._base.rows(start, stop), self._times, axis=self._axis)
        first = start // self._times
        values = np.repeat(self._base.rows(first, -(-stop // self._times)), self._times, axis=0)
        return values[start - first * self._times : stop - first * self._times]

    def numpy(self) -> NDArray:
        return self.rows(0, self.shape[0])
