"""Safetensors files: mapped tensors that are read a slice of rows at a time, and a writer that streams them.

The format is 8 bytes of header length (little endian), a JSON header `{name: {dtype, shape, data_offsets}}`, then the
data (https://github.com/huggingface/safetensors#format). The `safetensors` package judges headers; it has no writer
that streams, and no reader of bfloat16 for NumPy, so those are here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.reading import AGAIN, opened, read_json, regular
from gemexport.formats.tensor import DType, Floats, Grid, Rows, TensorBase, from_bf16, matrix_of

NUMPY_DTYPES: dict[str, str] = {
    "BF16": "<u2",  # the bit patterns: NumPy has no bfloat16
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "I8": "i1",
    "U8": "u1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "U64": "<u8",
    "BOOL": "?",
}
FLOAT_DTYPES: dict[str, DType] = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
DTYPE_NAMES: dict[DType, str] = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
INDEX_NAME = "model.safetensors.index.json"
MAX_TENSORS = 1 << 17  # of a model: 128 experts in 62 layers, with three arrays a matrix, are 71,000
MAX_HEADER_BYTES = 32 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: dtype in the format's spelling ("BF16", "U32" …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(NUMPY_DTYPES[self.dtype]).itemsize


class MappedFile:
    """A file that is mapped when its bytes are first asked for, once for all that look at a part of it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def bytes(self) -> NDArray[np.uint8]:
        """All of the file; the pages are the system's to drop."""
        return np.memmap(self.path, np.uint8, mode="r")


class MappedArray:
    """A tensor of a safetensors file as it is stored, mapped: `array` is a NumPy view (bf16 as uint16)."""

    def __init__(self, file: MappedFile, entry: Entry, offset: int) -> None:
        self.path = file.path
        self.entry = entry
        self.offset = offset
        self._file = file

    @property
    def array(self) -> NDArray[Any]:
        """A view of the mapped file in the tensor's shape."""
        dtype = np.dtype(NUMPY_DTYPES[self.entry.dtype])
        if self.entry.nbytes == 0:
            return np.empty(self.entry.shape, dtype)
        stored = self._file.bytes[self.offset : self.offset + self.entry.nbytes]
        return stored.view(dtype).reshape(self.entry.shape or (1,))

    @property
    def matrix(self) -> NDArray[Any]:
        """The same view as rows of the last axis, `[rows, width]`."""
        return self.array.reshape(matrix_of(self.entry.shape))

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of the last axis as they are stored, `[rows, width]`, read.

        For a single pass that takes half as long as a mapping.
        """
        dtype, (count, width) = np.dtype(NUMPY_DTYPES[self.entry.dtype]), matrix_of(self.entry.shape)
        stop = min(stop, count)
        offset = self.offset + start * width * dtype.itemsize
        return np.fromfile(self.path, dtype, (stop - start) * width, offset=offset).reshape(stop - start, width)


class MappedTensor(TensorBase):
    """A float tensor of a safetensors file, without a grid.

    Canonical names and shapes may differ from the file's: a scalar `[]` is `[1]` there.
    """

    grid: Grid | None = None

    def __init__(self, stored: MappedArray, name: str | None = None, shape: tuple[int, ...] | None = None) -> None:
        self.stored = stored
        self.name = name or stored.entry.name
        self.shape = stored.entry.shape if shape is None else shape
        self.dtype: DType = FLOAT_DTYPES[stored.entry.dtype]

    def rows(self, start: int, stop: int) -> Rows:
        return Rows(self._floats(self.stored.read(start, stop)))

    def numpy(self) -> Floats:
        return self._floats(self.stored.array).reshape(self.shape)

    def _floats(self, stored: NDArray[Any]) -> Floats:
        return from_bf16(stored) if self.dtype == "bf16" else np.asarray(stored, dtype=np.float32)


def read_file(path: Path) -> dict[str, MappedArray]:
    """Every tensor of one safetensors file, mapped.

    Raises InputError when the file is truncated or its header lies (offsets that overlap, leave gaps or exceed it).
    """
    length, text = _header(path)
    try:
        with safe_open(path, framework="numpy") as judged:
            judged.keys()
    except SafetensorError as error:
        raise InputError(path, f"is not a whole safetensors file ({error})", AGAIN) from error
    header = json.loads(text)
    tensors, mapped = {}, MappedFile(path)
    for name, item in header.items():
        if name == "__metadata__":
            continue
        if item["dtype"] not in NUMPY_DTYPES:
            raise InputError(
                path, f"tensor {name} has the dtype {item['dtype']}, which is not known here", "convert it"
            )
        entry = Entry(name, item["dtype"], tuple(item["shape"]))
        tensors[name] = MappedArray(mapped, entry, 8 + length + item["data_offsets"][0])
    return tensors


def _header(path: Path) -> tuple[int, bytes]:
    """The length that a file says its header has, and as much of that as there is; InputError for one without end."""
    try:
        with opened(path) as file:
            size = regular(path)
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, MAX_HEADER_BYTES))
    except FileNotFoundError as error:
        raise InputError(path, "the file is missing", AGAIN) from error
    count = text.count(b'"data_offsets"')
    if count > MAX_TENSORS or len(text) < length <= size:
        problem = f"has {count} tensors or more in a header of {length} bytes"
        raise InputError(path, problem, f"save the model in shards of fewer than {MAX_TENSORS} tensors")
    return length, text


def read_metadata(path: Path) -> dict[str, str]:
    """The free-form metadata of a safetensors file; InputError for a header without end."""
    _header(path)
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


def read_folder(folder: Path) -> dict[str, MappedArray]:
    """Every tensor of `model.safetensors`, or of the shards that its index names.

    Raises InputError for a missing shard, one outside the folder, or a tensor that is not in the shard it should be in.
    """
    index, single = folder / INDEX_NAME, folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise InputError(
                folder,
                "there is no model.safetensors and no index of shards",
                "save the model as safetensors",
            )
        return read_file(single)
    try:
        weight_map = read_json(index)["weight_map"]
        names = sorted(set(weight_map.values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(index, "is not an index of shards (no weight_map)", AGAIN) from error
    if single.is_file() and single.name not in names:
        return read_file(single)  # the index is of shards that were here before; transformers takes the file, too
    found: dict[str, MappedArray] = {}
    for name in names:
        shard = folder / str(name)
        # An index comes with the download: it must not make us read a file elsewhere.
        if Path(str(name)).name != str(name):
            raise InputError(
                index, f"names a shard outside the folder ({name})", "use an index whose shards lie beside it"
            )
        if not shard.is_file():
            raise InputError(index, f"names the shard {name}, which is missing", "download the missing shard")
        found |= read_file(shard)
        if len(found) > MAX_TENSORS:
            raise InputError(index, f"names more than {MAX_TENSORS} tensors", AGAIN)
    for tensor, name in weight_map.items():
        if tensor not in found:
            raise InputError(
                folder / name,
                f"has no tensor {tensor}, which the index puts there",
                "download the shard again",
            )
    return {tensor: found[tensor] for tensor in weight_map}


def weight_files(folder: Path) -> list[str]:
    """The names of the files that `read_folder` reads, its index among them."""
    index, single = folder / INDEX_NAME, "model.safetensors"
    if not index.is_file():
        return [single]
    names = {str(name) for name in read_json(index)["weight_map"].values()}
    return [single] if (folder / single).is_file() and single not in names else [INDEX_NAME, *sorted(names)]


class Writer:
    """Writes one safetensors file: the header first, then each tensor's bytes in any slices, in the order of `entries`.

    The header is padded to 8 bytes with spaces, as the reference implementation does, so that data is aligned.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
        self._entries = list(entries)
        self._position = 0
        self._written = 0
        self._file: BinaryIO = path.open("wb")
        self._file.write(_spelt(self._entries, metadata))

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Append the next bytes of tensor `name`; it must be the one whose turn it is."""
        while self._position < len(self._entries) and self._written == self._entries[self._position].nbytes:
            self._position += 1
            self._written = 0
        entry = self._entries[self._position]
        dtype = np.dtype(NUMPY_DTYPES[entry.dtype])
        if entry.name != name or array.dtype != dtype or self._written + array.nbytes > entry.nbytes:
            raise ValueError(f"{name} {array.dtype} does not continue {entry.name} {dtype} at byte {self._written}")
        self._file.write(np.ascontiguousarray(array).data if array.size else b"")
        self._written += array.nbytes

    def close(self) -> None:
        """Finish the file; raises ValueError when a tensor was not written whole."""
        self._file.close()
        missing = [entry.name for entry in self._entries[self._position + 1 :] if entry.nbytes]
        if missing or (self._entries and self._written != self._entries[self._position].nbytes):
            raise ValueError(f"not written whole: {[self._entries[self._position].name, *missing][:3]}")

    def abandon(self) -> None:
        """Close the file as it is, after an error."""
        self._file.close()


def _spelt(entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> bytes:
    """What stands before the data, with its length."""
    header: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {}).items()))} if metadata else {}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def nbytes(entries: Sequence[Entry], metadata: Mapping[str, str]) -> int:
    """Bytes of these tensors in one file; shards have some hundred more, and an index."""
    return len(_spelt(entries, metadata)) + sum(entry.nbytes for entry in entries)


@dataclass
class ShardedWriter:
    """Writes a model's tensors as `model.safetensors`, or as numbered shards with an index past `max_shard_bytes`.

    A context manager; `write` takes the tensors in the order of `entries`, in any slices.
    """

    folder: Path
    entries: Sequence[Entry]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    max_shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shards: list[list[Entry]] = [[]]
        size = 0
        for entry in self.entries:
            if shards[-1] and size + entry.nbytes > self.max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(entry)
            size += entry.nbytes
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        self._shards = list(zip(["model.safetensors"] if count == 1 else names, shards, strict=True))
        self._shard_of = {entry.name: i for i, (_, shard) in enumerate(self._shards) for entry in shard}
        self._current = -1
        self._writer: Writer | None = None

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Append the next bytes of tensor `name`."""
        wanted = self._shard_of[name]
        while self._current < wanted:
            self._advance()
        assert self._writer is not None
        self._writer.write(name, array)

    def _advance(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._current += 1
        name, shard = self._shards[self._current]
        self._writer = Writer(self.folder / name, shard, self.metadata)

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._writer is not None:
                self._writer.abandon()
            return
        while self._current < len(self._shards) - 1:
            self._advance()
        if self._writer is not None:
            self._writer.close()
        if len(self._shards) > 1:
            weight_map = {entry.name: name for name, shard in self._shards for entry in shard}
            index = {
                "metadata": {"total_size": sum(entry.nbytes for entry in self.entries)},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
