"""The GGUF container: a header of typed metadata and tensor descriptions, then the tensors' bytes, aligned.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package reads a header of 262,144 tokens
in half a minute and writes tensors that it holds, so this reads lazily, checks every length, and lets tensors stream.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.reading import regular

MAGIC = b"GGUF"
VERSION = 3  # 2 is the same bytes; 1 had 32-bit lengths
MENDED = "download or export the file again"
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 63  # ggml keeps a terminating zero
MAX_ENTRIES = 1 << 16  # tensors, and keys: more of them is a lie that would cost a hundred times its size in memory
_LENGTH = struct.Struct("<Q")  # of a string, before it
SPLIT = "split."  # keys that tell which part of a model a file is

_NUMPY: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class Value:
    """A metadata value with the type it has in the file; a sequence is an array of that type."""

    type: GGUFValueType
    value: Any

    def packed(self) -> bytes:
        """Its bytes, the type tag first."""
        if isinstance(self.value, (str, bytes)) or not isinstance(self.value, (Sequence, np.ndarray)):
            return struct.pack("<I", self.type) + self._items([self.value])
        head = struct.pack("<IIQ", GGUFValueType.ARRAY, self.type, len(self.value))
        return head + self._items(self.value)

    def _items(self, items: Sequence[Any] | NDArray[Any]) -> bytes:
        if self.type == GGUFValueType.STRING:
            return b"".join(_string(item) for item in items)
        return np.asarray(items, dtype=_NUMPY[self.type]).tobytes()


def uint32(value: int | Sequence[int]) -> Value:
    """An unsigned 32-bit value, or an array of them."""
    return Value(GGUFValueType.UINT32, value)


def int32(value: int | Sequence[int]) -> Value:
    """A signed 32-bit value, or an array of them."""
    return Value(GGUFValueType.INT32, value)


def float32(value: float | Sequence[float]) -> Value:
    """A 32-bit float, or an array of them."""
    return Value(GGUFValueType.FLOAT32, value)


def boolean(value: bool | Sequence[bool]) -> Value:
    """A truth value, or an array of them."""
    return Value(GGUFValueType.BOOL, value)


def string(value: str | Sequence[str]) -> Value:
    """A UTF-8 string, or an array of them."""
    return Value(GGUFValueType.STRING, value)


def _string(text: str | bytes) -> bytes:
    data = text.encode("utf-8") if isinstance(text, str) else text
    return len(data).to_bytes(8, "little") + data


@dataclass(frozen=True)
class Description:
    """A tensor of a GGUF file: shape in NumPy's order (`[out, in]`), offset from the start of the file in bytes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, its last axis."""
        return row_bytes(self.type, self.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.row_bytes * math.prod(self.shape[:-1])


def row_bytes(kind: GGMLQuantizationType, width: int) -> int:
    """Bytes that `width` weights take; `width` must be a multiple of the type's block."""
    block, size = GGML_QUANT_SIZES[kind]
    return width // block * size


class Strings(Sequence[str]):
    """An array of strings in a mapped file, decoded when asked for."""

    def __init__(self, data: memoryview, offsets: list[int]) -> None:
        self._data = data
        self._offsets = offsets  # of each string's length field

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._at(offset) for offset in self._offsets[index]]
        return self._at(self._offsets[index])

    def __iter__(self) -> Iterator[str]:
        return map(self._at, self._offsets)

    def _at(self, offset: int) -> str:
        start = offset + _LENGTH.size
        return str(self._data[start : start + _LENGTH.unpack_from(self._data, offset)[0]], "utf-8", "replace")


@dataclass(frozen=True)
class Packed:
    """Metadata as it is in a file, for a copy that changes tensors only; offsets are multiples of `alignment`."""

    count: int
    data: bytes
    alignment: int = GGUF_DEFAULT_ALIGNMENT

    @classmethod
    def of(cls, metadata: Mapping[str, Value]) -> Packed:
        """The bytes of keys and values."""
        return cls(len(metadata), b"".join(_string(key) + value.packed() for key, value in metadata.items()))


@dataclass(frozen=True)
class Container:
    """A GGUF file's header, and its bytes mapped."""

    path: Path
    metadata: dict[str, Any]  # numbers, strings, NumPy arrays, Strings
    packed: Packed  # but for what makes it a part of several
    tensors: dict[str, Description]
    data: NDArray[np.uint8]

    def rows(self, description: Description, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes `[rows, row bytes]` of some rows of a tensor, mapped; leading axes count as one."""
        width = description.row_bytes
        first = description.offset + start * width
        return self.data[first : first + (stop - start) * width].reshape(stop - start, width)


class _Cursor:
    """Reads a mapped header from front to back; InputError when it would pass the end of the file."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path = path
        self.data = data
        self.view: memoryview = data.data
        self.position = 0

    def fail(self, problem: str) -> InputError:
        return InputError(self.path, f"is not a whole GGUF file ({problem})", MENDED)

    def past_end(self) -> InputError:
        return self.fail("the header ends beyond the end of the file")

    def take(self, count: int) -> memoryview:
        if count > len(self.view) - self.position:
            raise self.past_end()
        start, self.position = self.position, self.position + count
        return self.view[start : self.position]

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        try:
            return bytes(self.take(self.integer(8))).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail("a name in the header is not UTF-8") from error

    def value(self) -> Any:
        kind = self._kind()
        if kind == GGUFValueType.ARRAY:
            return self._array()
        if kind == GGUFValueType.STRING:
            return bytes(self.take(self.integer(8))).decode("utf-8", "replace")
        return self._numbers(kind, 1)[0].item()

    def _kind(self) -> GGUFValueType:
        code = self.integer(4)
        try:
            return GGUFValueType(code)
        except ValueError as error:
            raise self.fail(f"a metadata value has the unknown type {code}") from error

    def _array(self) -> Any:
        kind, count = self._kind(), self.integer(8)
        if kind == GGUFValueType.STRING:
            return self._strings(count)
        if kind == GGUFValueType.ARRAY:
            raise self.fail("an array of arrays")
        return self._numbers(kind, count)

    def _numbers(self, kind: GGUFValueType, count: int) -> NDArray[Any]:
        dtype = np.dtype(_NUMPY[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype)

    def _strings(self, count: int) -> Strings:
        if count * 8 > len(self.view) - self.position:
            raise self.fail("an array of strings is longer than the file")
        offsets, position, length = [], self.position, _LENGTH.unpack_from
        try:
            for _ in range(count):
                offsets.append(position)
                position += _LENGTH.size + length(self.view, position)[0]
        except (struct.error, OverflowError) as error:  # the position is beyond the end
            raise self.past_end() from error
        self.take(position - self.position)
        return Strings(self.view, offsets)


def read(path: Path) -> Container:
    """The header of the GGUF file at `path`, its tensors' bytes mapped.

    Raises InputError for a file that is truncated, is not GGUF, or describes tensors that do not lie in it.
    """
    path = Path(path)
    try:
        size = regular(path)
        data = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
    except FileNotFoundError as error:
        raise InputError(path, "the file is missing", "give the path of a .gguf file") from error
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "give the path of a .gguf file") from error
    cursor = _Cursor(path, data)
    if size < 24 or bytes(cursor.take(4)) != MAGIC:
        raise InputError(path, "is not a GGUF file", "give the path of a .gguf file")
    version = cursor.integer(4)
    if version not in (2, 3):
        raise InputError(path, f"has GGUF version {version}", "convert it with a newer tool to version 3")
    tensor_count, value_count = cursor.integer(8), cursor.integer(8)
    if max(tensor_count, value_count) > MAX_ENTRIES:
        raise cursor.fail(f"{tensor_count} tensors and {value_count} keys")
    metadata: dict[str, Any] = {}
    kept = []
    for _ in range(value_count):
        start, key = cursor.position, cursor.text()
        if key in metadata:
            raise cursor.fail(f"the key {key} is there twice")
        metadata[key] = cursor.value()
        if not key.startswith(SPLIT):
            kept.append(data[start : cursor.position].tobytes())
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.fail(f"an alignment of {alignment}")
    packed = Packed(len(kept), b"".join(kept), alignment)
    return Container(path, metadata, packed, _descriptions(cursor, tensor_count, alignment), data)


def _descriptions(cursor: _Cursor, count: int, alignment: int) -> dict[str, Description]:
    """The tensor table at the cursor, its offsets made absolute and checked against the file."""
    entries = [_entry(cursor) for _ in range(count)]
    base = aligned(cursor.position, alignment)
    tensors: dict[str, Description] = {}
    end = base
    for entry in sorted(entries, key=lambda entry: entry.offset):
        found = Description(entry.name, entry.shape, entry.type, base + entry.offset)
        if entry.offset % alignment or found.offset < end:
            raise cursor.fail(f"tensor {entry.name} overlaps another or is not aligned")
        if found.offset + found.nbytes > len(cursor.view):
            raise cursor.fail(f"tensor {entry.name} ends beyond the end of the file")
        if found.name in tensors:
            raise cursor.fail(f"tensor {entry.name} is there twice")
        tensors[found.name] = found
        end = found.offset + found.nbytes
    return {entry.name: tensors[entry.name] for entry in entries}


def _entry(cursor: _Cursor) -> Description:
    name, dimensions = cursor.text(), cursor.integer(4)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(reversed([cursor.integer(8) for _ in range(dimensions)]))
    if 0 in shape:
        raise cursor.fail(f"tensor {name} has no weights")
    code, offset = cursor.integer(4), cursor.integer(8)
    try:
        kind = GGMLQuantizationType(code)
    except ValueError as error:
        remedy = "convert it to a type that gguf knows"
        raise InputError(cursor.path, f"tensor {name} has the unknown type {code}", remedy) from error
    if shape[-1] % GGML_QUANT_SIZES[kind][0]:
        raise cursor.fail(f"tensor {name} has rows of {shape[-1]} weights in blocks of {GGML_QUANT_SIZES[kind][0]}")
    return Description(name, shape, kind, offset)


def aligned(position: int, alignment: int = GGUF_DEFAULT_ALIGNMENT) -> int:
    """The first multiple of `alignment` at or after `position`."""
    return -(-position // alignment) * alignment


def nbytes(packed: Packed, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, GGMLQuantizationType]) -> int:
    """Bytes of a file with these metadata, and with tensors of these shapes and types."""
    head = len(_head(packed, len(shapes))) + len(_table(shapes, {}))
    data = (Description(name, shape, kinds[name], 0).nbytes for name, shape in shapes.items())
    return aligned(head, packed.alignment) + sum(aligned(size, packed.alignment) for size in data)


def _head(packed: Packed, tensors: int) -> bytes:
    return MAGIC + struct.pack("<IQQ", VERSION, tensors, packed.count) + packed.data


def _table(shapes: Mapping[str, tuple[int, ...]], written: Mapping[str, tuple[GGMLQuantizationType, int]]) -> bytes:
    """Descriptions of tensors, with a type and an offset in the data where there is one."""
    parts = []
    for name, shape in shapes.items():
        kind, offset = written.get(name, (GGMLQuantizationType.F32, 0))
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts.append(_string(name) + dimensions + struct.pack("<IQ", kind, offset))
    return b"".join(parts)


class Writer:
    """Writes a GGUF file, tensor after tensor, each in any slices.

    A description takes the same bytes whatever the type, so the header is written last, over a hole of its size: a
    tensor's type may be decided while it is written (`restart` takes back what was written of it).
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, Value] | Packed, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        for name in shapes:
            if len(name.encode()) > MAX_NAME_BYTES:
                raise ValueError(f"{name}: a tensor's name has at most {MAX_NAME_BYTES} bytes")
        self._file: BinaryIO = Path(path).open("wb")  # noqa: SIM115 - closed by `close`, on errors by `__exit__`
        self._shapes = dict(shapes)
        packed = metadata if isinstance(metadata, Packed) else Packed.of(metadata)
        self._alignment = packed.alignment
        self._head = _head(packed, len(shapes))
        self._base = aligned(len(self._head) + len(_table(self._shapes, {})), self._alignment)
        self._written: dict[str, tuple[GGMLQuantizationType, int]] = {}
        self._open: str | None = None  # the tensor that is being written, and where it starts
        self._start = self._base
        self._file.seek(self._base)

    def write(self, name: str, kind: GGMLQuantizationType, data: NDArray[Any]) -> None:
        """Append bytes to tensor `name`, which is of type `kind`; the tensor before it must be complete."""
        if name != self._open:
            self._finish()
            if name in self._written:
                raise ValueError(f"{name}: another tensor was written since")
            self._open, self._start = name, self._file.tell()
            self._written[name] = (kind, self._start - self._base)
        if self._written[name][0] != kind:
            raise ValueError(f"{name}: begun as {self._written[name][0].name}, continued as {kind.name}")
        self._file.write(np.ascontiguousarray(data).data)

    def restart(self, name: str) -> None:
        """Take back what was written of tensor `name`, the last one, so that it can be written in another type."""
        if name == self._open:
            del self._written[name]
            self._open = None
            self._file.seek(self._start)
            self._file.truncate()

    def _finish(self) -> None:
        """Check that the tensor being written is whole, and pad it."""
        if self._open is None:
            return
        name, self._open = self._open, None
        position = self._file.tell()
        wanted = Description(name, self._shapes[name], self._written[name][0], 0).nbytes
        if position - self._start != wanted:
            raise ValueError(f"{name}: {position - self._start} bytes written of {wanted}")
        self._file.write(bytes(aligned(position, self._alignment) - position))

    def close(self) -> None:
        """Write the header and close; ValueError when a tensor is missing or not whole."""
        self._finish()
        missing = self._shapes.keys() - self._written.keys()
        if missing:
            raise ValueError(f"tensors not written: {sorted(missing)}")
        self._file.seek(0)
        self._file.write(self._head + _table(self._shapes, self._written))
        self._file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
