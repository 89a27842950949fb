"""What exporters of Hugging Face folders share: tensors written slice by slice, config and tokenizer beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.safetensors import DTYPE_NAMES, NUMPY_DTYPES, ShardedWriter
from gemexport.formats.tensor import ITEM_BYTES, DType, Floats, Tensor, from_bf16, round_to, slices, to_bf16


def write_settings(folder: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """config.json, and the checkpoint's tokenizer, chat template and generation settings as they are."""
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", "utf-8")
    for file in checkpoint.tokenizer_files():
        shutil.copyfile(file, folder / file.name)


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
    parts: Iterable[Floats] = [tensor.numpy()] if len(tensor.shape) != 2 else _slices(tensor)
    exact, rounded = dtype in (tensor.dtype, "f32"), 0
    for values in parts:
        rounded += 0 if exact else count_rounded(values, dtype)
        out.write(tensor.name, stored(values, dtype, exact))
        progress(values.size * ITEM_BYTES[tensor.dtype])
    if rounded:
        notes.append(f"{tensor.name}: {rounded} weights are not {dtype} numbers and were rounded")


def _slices(tensor: Tensor) -> Iterator[Floats]:
    for start, stop in slices(tensor):
        yield tensor.rows(start, stop).values


class Waiting:
    """Scales that come in with the codes and go out after the last of them: kept in a file, not in memory."""

    def __init__(self, folder: Path, dtype: DType) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - __exit__ closes it
        self._dtype = dtype

    def write(self, scales: Floats, exact: bool) -> None:
        """Append scales, rounded to the dtype unless they are known to be `exact`."""
        self._file.write(np.ascontiguousarray(stored(scales, self._dtype, exact)).data)

    def chunks(self, count: int = 1 << 20) -> Iterator[Floats]:
        """All scales from the first, `count` at a time, as float32."""
        self._file.seek(0)
        while data := self._file.read(count * ITEM_BYTES[self._dtype]):
            numbers = np.frombuffer(data, NUMPY_DTYPES[DTYPE_NAMES[self._dtype]])
            yield from_bf16(numbers) if self._dtype == "bf16" else numbers.astype(np.float32)

    def __enter__(self) -> Waiting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
