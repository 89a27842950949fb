"""The weight file of an ML program, `weights/weight.bin`: read mapped, written a slice of rows at a time.

Core ML's blob storage, version 2 (coremltools, mlmodel/src/MILBlob/Blob/StorageFormat.hpp): a 64-byte header (blob
count and version, both uint32), then for each blob 64 bytes of metadata and its data, both on 64-byte boundaries.
The metadata is the sentinel 0xDEADBEEF, the type (uint32 each), bytes of data, its offset in the file, and the bits
of padding in its last byte (uint64 each). A program refers to a blob by the offset of its metadata. Elements of less
than a byte are packed lowest bits first.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.storage.bitpack import fields
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.reading import regular

ALIGNMENT = 64
VERSION = 2
SENTINEL = 0xDEADBEEF
_HEADER = struct.Struct("<II56x")
_METADATA = struct.Struct("<IIQQQ32x")
_REMEDY = "export or download the package again"
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class BlobType:
    """An element type of MIL as weight.bin stores it."""

    name: str  # MIL's name
    code: int  # BlobDataType
    bits: int
    dtype: np.dtype  # of an unpacked element
    signed: bool = False  # of a type that numpy does not have


TYPES: dict[str, BlobType] = {
    kind.name: kind
    for kind in (
        BlobType("fp16", 1, 16, np.dtype("<f2")),
        BlobType("fp32", 2, 32, np.dtype("<f4")),
        BlobType("uint8", 3, 8, np.dtype("u1")),
        BlobType("int8", 4, 8, np.dtype("i1")),
        BlobType("bf16", 5, 16, np.dtype("<u2")),
        BlobType("int16", 6, 16, np.dtype("<i2")),
        BlobType("uint16", 7, 16, np.dtype("<u2")),
        BlobType("int4", 8, 4, np.dtype("i1"), signed=True),
        BlobType("uint1", 9, 1, np.dtype("u1")),
        BlobType("uint2", 10, 2, np.dtype("u1")),
        BlobType("uint4", 11, 4, np.dtype("u1")),
        BlobType("uint3", 12, 3, np.dtype("u1")),
        BlobType("uint6", 13, 6, np.dtype("u1")),
        BlobType("int32", 14, 32, np.dtype("<i4")),
        BlobType("uint32", 15, 32, np.dtype("<u4")),
    )
}
_BY_CODE = {kind.code: kind for kind in TYPES.values()}


def pack(codes: NDArray, bits: int) -> Bytes:
    """Codes of `bits` bits each, in row-major order, as bytes: lowest bits first, two's complement if signed."""
    flat = np.ascontiguousarray(codes).reshape(-1).astype(np.uint8) & np.uint8((1 << bits) - 1)
    share = 8 // bits
    if 8 % bits == 0 and flat.size % share == 0:
        packed = flat[0::share].copy()
        for i in range(1, share):
            packed |= flat[i::share] << np.uint8(i * bits)
        return packed
    return np.packbits(np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack(packed: Bytes, bits: int, start: int, count: int, signed: bool) -> NDArray:
    """`count` codes from the `start`-th on, as int8 where `signed`, else uint8."""
    first, skip = divmod(start * bits, 8)
    raw = np.asarray(packed[first : -(-(start + count) * bits // 8)])
    share = 8 // bits
    if 8 % bits == 0 and skip == 0 and count % share == 0:
        codes = fields(raw, bits)
    else:
        stream = np.unpackbits(raw, bitorder="little")[skip : skip + count * bits].reshape(count, bits)
        codes = np.packbits(stream, axis=1, bitorder="little").reshape(count)
    if not signed:
        return codes
    half = np.uint8(1 << (bits - 1))
    codes ^= half
    codes -= half
    return codes.view(np.int8)


@dataclass(frozen=True)
class Blob:
    """One array of a weight file, mapped."""

    kind: BlobType
    data: Bytes

    def elements(self, start: int, count: int) -> NDArray:
        """`count` elements from the `start`-th on, unpacked."""
        if self.kind.bits < 8:
            return unpack(self.data, self.kind.bits, start, count, self.kind.signed)
        size = self.kind.dtype.itemsize
        return self.data[start * size : (start + count) * size].view(self.kind.dtype)


class BlobFile:
    """A weight file, mapped; its pages are the system's to drop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            regular(path)
            self._bytes: Bytes = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise InputError(path, f"cannot be read ({error})", _REMEDY) from error
        if self._bytes.size < _HEADER.size or _HEADER.unpack(self._bytes[: _HEADER.size].tobytes())[1] != VERSION:
            raise InputError(path, "is not a Core ML weight file of version 2", _REMEDY)

    def blob(self, offset: int, kind: str, count: int) -> Blob:
        """The blob whose metadata is at `offset`; InputError unless it has `count` elements of MIL type `kind`."""
        size = self._bytes.size
        if not 0 < offset <= size - _METADATA.size:
            raise InputError(self.path, f"there is no metadata at byte {offset} of {size}", _REMEDY)
        sentinel, code, nbytes, data, _ = _METADATA.unpack(self._bytes[offset : offset + _METADATA.size].tobytes())
        if sentinel != SENTINEL or code not in _BY_CODE:
            raise InputError(self.path, f"there is no blob metadata at byte {offset}", _REMEDY)
        if data + nbytes > size:
            raise InputError(self.path, f"the blob at byte {offset} ends beyond the file", _REMEDY)
        found = _BY_CODE[code]
        if found.name != kind or nbytes != -(-count * found.bits // 8):
            problem = f"the blob at byte {offset} is {nbytes} bytes of {found.name}, the program expects {count} {kind}"
            raise InputError(self.path, problem, _REMEDY)
        return Blob(found, self._bytes[data : data + nbytes])


@dataclass(frozen=True)
class Entry:
    """A blob to be written: its name (for the writer's caller only), MIL type and number of elements."""

    name: str
    kind: str
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return -(-self.count * TYPES[self.kind].bits // 8)


class BlobLayout:
    """Where each blob of a weight file will lie, known before any data is."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.offsets: dict[str, int] = {}  # entry name -> offset of its metadata
        self._end = _HEADER.size

    @property
    def nbytes(self) -> int:
        """Bytes of the weight file; nothing fills up what follows the last blob."""
        if not self.entries:
            return _HEADER.size
        last = next(reversed(self.entries.values()))
        return self.offsets[last.name] + _METADATA.size + last.nbytes

    def add(self, entry: Entry) -> None:
        """Give `entry` the next place; ValueError if its name is taken."""
        if entry.name in self.entries:
            raise ValueError(f"two blobs are called {entry.name}")
        self.entries[entry.name] = entry
        self.offsets[entry.name] = self._end
        self._end = -(-(self._end + _METADATA.size + entry.nbytes) // ALIGNMENT) * ALIGNMENT


class BlobWriter:
    """Writes the weight file of a layout, the blobs' rows in any interleaving; data of one blob is appended in order.

    Raises ValueError for data that does not fill its entry.
    """

    def __init__(self, path: Path, layout: BlobLayout) -> None:
        self._entries, self._offsets = layout.entries, layout.offsets
        self._written = dict.fromkeys(self._entries, 0)
        self._file = path.open("wb")
        self._file.write(_HEADER.pack(len(self._entries), VERSION))
        for name, entry in self._entries.items():
            kind, offset = TYPES[entry.kind], self._offsets[name]
            padding = entry.nbytes * 8 - entry.count * kind.bits
            self._file.seek(offset)
            self._file.write(_METADATA.pack(SENTINEL, kind.code, entry.nbytes, offset + _METADATA.size, padding))

    def empty(self, name: str) -> bool:
        """Whether nothing was written to the entry yet."""
        return self._written[name] == 0

    def write(self, name: str, elements: NDArray) -> None:
        """Append elements (codes of less than a byte as integers) to the entry `name`."""
        entry = self._entries[name]
        kind = TYPES[entry.kind]
        done = self._written[name]
        if kind.bits < 8:
            raw = pack(elements, kind.bits)
        else:
            raw = np.ascontiguousarray(elements, dtype=kind.dtype).reshape(-1).view(np.uint8)
        if done + elements.size > entry.count or done * kind.bits % 8:
            raise ValueError(f"{name}: {elements.size} elements after {done} of {entry.count} do not fit")
        self._file.seek(self._offsets[name] + _METADATA.size + done * kind.bits // 8)
        self._file.write(raw.data)
        self._written[name] = done + elements.size

    def close(self) -> None:
        """Finish the file; ValueError when an entry was not filled."""
        self._file.close()
        for name, entry in self._entries.items():
            if self._written[name] != entry.count:
                raise ValueError(f"{name}: {self._written[name]} elements of {entry.count} were written")

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
