"""A weight of a written artefact as the numbers that are stored, to be read, changed and put back in the same bytes.

Codes and scales, however a format packs them, become `[out, in]` and `[out, blocks]`; whatever has no codes is the bit
patterns of its numbers. Faults are then a line of NumPy, the same line for every format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.tensor import from_bf16, to_bf16

Array = NDArray[Any]
HALF_BLOCK, SCALE_BYTES = 16, 2  # of a Q4_0 block: code i and code i + 16 share a byte, after an f16 scale


@dataclass
class Numbers:
    """What is stored of a matrix: unsigned codes, or bit patterns, `[out, in]`; scales and biases `[out, blocks]`."""

    codes: Array
    scales: list[Array]
    bits: int = 0  # of a code; 0: there are none

    @property
    def largest(self) -> int:
        """The largest code, of signed ones or unsigned ones."""
        return (1 << (self.bits - 1 if self.codes.dtype == np.int8 else self.bits)) - 1


class Place(Protocol):
    """Where a tensor lies in an artefact."""

    def read(self) -> Numbers:
        """A copy of the numbers."""
        ...

    def write(self, numbers: Numbers) -> None:
        """Put numbers of the same shapes back."""
        ...


def writable(view: Array) -> Array:
    """The same bytes of the same file as `view`, a contiguous part of a read-only mapping, to be written to.

    Raises ValueError for an array that is no part of a mapped file.
    """
    base: Any = view
    while not (isinstance(base, np.memmap) and not isinstance(base.base, np.memmap)):
        base = base.base
        if base is None:
            raise ValueError("the array is not mapped from a file")
    if not view.flags.c_contiguous:
        raise ValueError("the array is not one run of bytes")
    start = int(base.offset + view.__array_interface__["data"][0] - base.__array_interface__["data"][0])
    kind: Any = view.dtype
    found: Array = np.memmap(str(base.filename), kind, "r+", offset=start, shape=view.shape)
    return found


class Packed:
    """Codes of `bits` bits, the first in a byte's lowest, and scales beside them; both may lie transposed."""

    def __init__(self, packed: Array, scales: Sequence[Array], transposed: bool = False, bits: int = 4) -> None:
        self._packed = writable(packed)
        self._scales = [writable(array) for array in scales]
        self._transposed, self._bits = transposed, bits
        self._shifts = np.arange(0, 8, bits, dtype=np.uint8)
        self._mask = np.uint8((1 << bits) - 1)

    def read(self) -> Numbers:
        data = self._packed.view(np.uint8)
        codes = (data[:, :, None] >> self._shifts & self._mask).reshape(len(data), -1)
        return Numbers(self._turned(codes), [self._turned(array).copy() for array in self._scales], self._bits)

    def write(self, numbers: Numbers) -> None:
        codes = self._turned(numbers.codes)
        fields = codes.reshape(len(codes), -1, len(self._shifts)) << self._shifts
        self._packed.view(np.uint8)[:] = np.bitwise_or.reduce(fields, axis=2)
        for stored, array in zip(self._scales, numbers.scales, strict=True):
            stored[:] = self._turned(array)

    def _turned(self, array: Array) -> Array:
        return np.ascontiguousarray(array.T) if self._transposed else array


class Bytes:
    """Signed codes of `bits` bits, each in a byte of its own, and scales beside them."""

    def __init__(self, codes: Array, scales: Array, bits: int) -> None:
        self._codes, self._scales, self._bits = writable(codes), writable(scales), bits

    def read(self) -> Numbers:
        return Numbers(self._codes.copy(), [self._scales.copy()], self._bits)

    def write(self, numbers: Numbers) -> None:
        self._codes[:] = numbers.codes
        self._scales[:] = numbers.scales[0]


class Q40:
    """Rows of ggml's Q4_0 blocks `[rows, bytes]`."""

    def __init__(self, rows: Array) -> None:
        self._rows = writable(rows)

    def read(self) -> Numbers:
        blocks = self._blocks()
        scales = np.ascontiguousarray(blocks[:, :, :SCALE_BYTES]).view("<f2")[:, :, 0]
        fields = blocks[:, :, SCALE_BYTES:]
        codes = np.concatenate([fields & 15, fields >> 4], axis=2)
        return Numbers(codes.reshape(len(codes), -1), [scales], 4)

    def write(self, numbers: Numbers) -> None:
        blocks = self._blocks()
        codes = numbers.codes.reshape(*blocks.shape[:2], 2 * HALF_BLOCK)
        blocks[:, :, :SCALE_BYTES] = np.ascontiguousarray(numbers.scales[0])[:, :, None].view(np.uint8)
        blocks[:, :, SCALE_BYTES:] = codes[:, :, :HALF_BLOCK] | codes[:, :, HALF_BLOCK:] << 4

    def _blocks(self) -> Array:
        return self._rows.reshape(self._rows.shape[0], -1, SCALE_BYTES + HALF_BLOCK)


class Q80:
    """Rows of ggml's Q8_0 blocks `[rows, bytes]`: an f16 scale, then 32 signed codes."""

    def __init__(self, rows: Array) -> None:
        self._blocks = writable(rows).reshape(len(rows), -1, SCALE_BYTES + 2 * HALF_BLOCK)

    def read(self) -> Numbers:
        scales = np.ascontiguousarray(self._blocks[:, :, :SCALE_BYTES]).view("<f2")[:, :, 0]
        codes = self._blocks[:, :, SCALE_BYTES:].reshape(len(self._blocks), -1).view(np.int8)
        return Numbers(codes, [scales], 8)

    def write(self, numbers: Numbers) -> None:
        scales = np.ascontiguousarray(numbers.scales[0])[:, :, None]
        self._blocks[:, :, :SCALE_BYTES] = scales.view(np.uint8)
        self._blocks[:, :, SCALE_BYTES:] = numbers.codes.view(np.uint8).reshape(*self._blocks.shape[:2], -1)


class Plain:
    """Numbers as they are; bf16 as bit patterns."""

    def __init__(self, array: Array, transposed: bool = False) -> None:
        self._array, self._transposed = writable(array), transposed

    def read(self) -> Numbers:
        array = self._array.T if self._transposed else self._array
        return Numbers(array.copy(), [])

    def write(self, numbers: Numbers) -> None:
        self._array[:] = numbers.codes.T if self._transposed else numbers.codes


class Below:
    """Rows of a tensor in several places, one below the other."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places

    def read(self) -> Numbers:
        found = [place.read() for place in self._places]
        scales = [np.concatenate(arrays) for arrays in zip(*(each.scales for each in found), strict=True)]
        return Numbers(np.concatenate([each.codes for each in found]), scales, found[0].bits)

    def write(self, numbers: Numbers) -> None:
        start = 0
        for place in self._places:
            stop = start + len(place.read().codes)
            place.write(Numbers(numbers.codes[start:stop], [array[start:stop] for array in numbers.scales]))
            start = stop


class Twice:
    """One tensor that an artefact holds in two places."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places

    def read(self) -> Numbers:
        return self._places[0].read()

    def write(self, numbers: Numbers) -> None:
        for place in self._places:
            place.write(numbers)


def floats(stored: Array) -> NDArray[np.float32]:
    """The values of plain numbers; 16-bit integers are bf16."""
    return from_bf16(stored) if stored.dtype == np.uint16 else np.asarray(stored, np.float32)


def like(values: NDArray[np.float32], stored: Array) -> Array:
    """Values in the dtype that `stored` has."""
    return to_bf16(values) if stored.dtype == np.uint16 else values.astype(stored.dtype)
