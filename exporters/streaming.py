"""What exporters of Hugging Face folders share: tensors written slice by slice, config and tokenizer beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.storage.parallel import by_rows
from gemexport.formats.storage.reading import copy, read_optional_json
from gemexport.formats.storage.safetensors import DTYPE_NAMES, NUMPY_DTYPES, Entry, ShardedWriter
from gemexport.formats.tensor import ITEM_BYTES, DType, Floats, Rows, Tensor, round_to, slices, to_bf16


def decoder_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of the decoder alone, in the spelling it came in."""
    return {**checkpoint.text_config, "architectures": [checkpoint.model.family.reference_class]}


def write_settings(folder: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """config.json, and the checkpoint's tokenizer, chat template and generation settings as they are."""
    (folder / "config.json").write_text(_spelt(config), "utf-8")
    for file in checkpoint.tokenizer_files():
        copy(file, folder / file.name)


def settings_bytes(config: Mapping[str, Any], checkpoint: Checkpoint) -> int:
    """Bytes of what `write_settings` writes."""
    return len(_spelt(config).encode()) + sum(file.stat().st_size for file in checkpoint.tokenizer_files())


def _spelt(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object beside the weights, empty where there is no such file; InputError for one that is broken."""
    return read_optional_json(path, "save the tokenizer again")


def rounding_note(rounded: Mapping[str, int], dtype: DType) -> list[str]:
    """One sentence about scales that had to be rounded, by tensor; none when none had."""
    counts = {name: count for name, count in rounded.items() if count}
    if not counts:
        return []
    total, names = sum(counts.values()), ", ".join(list(counts)[:3]) + (" …" if len(counts) > 3 else "")
    return [f"{total} scales are not {dtype} numbers and were rounded, in {len(counts)} tensors ({names})"]


def stored(values: Floats, dtype: DType, exact: bool = False) -> NDArray[Any]:
    """Float32 values as `dtype` is stored (bf16 as uint16), rounded; `exact`: they are known to need no rounding."""
    if dtype != "bf16":
        return values.astype(NUMPY_DTYPES[DTYPE_NAMES[dtype]], copy=False)
    if exact:
        return np.ascontiguousarray(values).view("<u2").reshape(*values.shape, 2)[..., 1]
    return to_bf16(values)


def count_rounded(values: Floats, dtype: DType) -> int:
    """How many of the values `dtype` cannot hold."""
    return int(np.count_nonzero(round_to(values, dtype) != values))


def write_plain(
    out: ShardedWriter, tensor: Tensor, dtype: DType, notes: list[str], progress: Callable[[int], None]
) -> None:
    """Write a tensor's own values in `dtype`; a note says how many had to be rounded."""
    exact, rounded = dtype in (tensor.dtype, "f32"), 0
    for bounds in slices(tensor):
        values = tensor.rows(*bounds).values
        rounded += 0 if exact else count_rounded(values, dtype)
        out.write(tensor.name, stored(values, dtype, exact))
        progress(values.size * ITEM_BYTES[tensor.dtype])
    if rounded:
        notes.append(f"{tensor.name}: {rounded} weights are not {dtype} numbers and were rounded")


@dataclass(frozen=True)
class Column:
    """An array with a number for each group of a row; it follows its tensor's codes, and is made while they are."""

    entry: Entry
    encode: Callable[[Rows], NDArray[Any]]  # `[rows, groups]`, in any dtype
    # What is stored of rows in any multiple of PACKED_ROWS, where that is not what `encode` gives.
    finish: Callable[[NDArray[Any]], NDArray[Any]] | None = None


@dataclass
class Rounding:
    """Counts the numbers that a dtype could not hold."""

    dtype: DType
    count: int = 0

    def store(self, values: Floats | NDArray[np.float64], exact: bool = False) -> NDArray[Any]:
        """Values as the dtype is stored; those of an array that is not known to be `exact` are counted."""
        narrow = values.astype(np.float32, copy=False)
        self.count += 0 if exact else int(np.count_nonzero(round_to(narrow, self.dtype) != values))
        return stored(narrow, self.dtype, exact)


PACKED_ROWS = 32  # so many codes of any width end where a 32-bit word ends
_HELD = 1 << 20  # numbers of a column that are in memory at a time


def write_packed(
    out: ShardedWriter,
    folder: Path,
    tensor: Tensor,
    codes: tuple[str, Callable[[Rows], NDArray[Any]]],
    columns: Sequence[Column],
    progress: Callable[[int], None],
) -> None:
    """Write a tensor's codes (the array's name, and what it holds of rows) slice by slice, then its columns.

    Columns wait in files in `folder`: codes and columns come from the same rows, which are read once.
    """
    name, pack = codes

    def packed(bounds: tuple[int, int]) -> tuple[int, Rows, NDArray[Any]]:
        rows = tensor.rows(*bounds)
        return bounds[1] - bounds[0], rows.beside(), pack(rows)

    with ExitStack() as stack:
        files = [stack.enter_context(TemporaryFile(dir=folder)) for _ in columns]
        dtypes: list[np.dtype[Any]] = []
        for count, rows, data in by_rows(packed, tensor):
            out.write(name, data)
            made = [column.encode(rows) for column in columns]
            dtypes = [array.dtype for array in made]
            groups = [array.shape[1] for array in made]
            for file, array in zip(files, made, strict=True):
                file.write(np.ascontiguousarray(array).data)
            progress(count * tensor.shape[-1] * ITEM_BYTES[tensor.dtype])
        for column, file, dtype, count in zip(columns, files, dtypes, groups, strict=True):
            file.seek(0)
            step = max(1, _HELD // count // PACKED_ROWS) * PACKED_ROWS
            while read := file.read(step * count * dtype.itemsize):
                array = np.frombuffer(read, dtype).reshape(-1, count)
                out.write(column.entry.name, array if column.finish is None else column.finish(array))
