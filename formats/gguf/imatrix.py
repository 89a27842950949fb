"""llama.cpp's importance matrices: for each matrix of a model, how much the inputs of its columns weigh.

`llama-imatrix` measures the mean square of every input over a text. It writes it as GGUF (tensors `NAME.in_sum2` and
`NAME.counts`), and once wrote it in a layout of its own (both: common/imatrix-loader.cpp of llama.cpp).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from gemexport.formats.gguf.container import MAGIC, Container, read
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.reading import opened, read_bytes
from gemexport.formats.tensor import Floats

SUMS, COUNTS = ".in_sum2", ".counts"
CHUNKS = "imatrix.chunk_count"
MAX_BYTES = 1 << 30  # four bytes for a column of each matrix: the largest known have a few hundred megabytes
REMEDY = "give a file of llama-imatrix"


@dataclass(frozen=True)
class Imatrix:
    """Importances `[in]` by the GGUF name of the matrix; of experts, one behind the other."""

    path: Path
    entries: dict[str, Floats]
    chunks: int  # pieces of text that were measured, 0 where the file does not say


def read_imatrix(path: Path) -> Imatrix:
    """The importance matrix in the file `path`, in either layout; sums are divided by counts as llama-quantize does.

    Raises InputError for a file that is neither, is broken, or holds numbers that are not finite.
    """
    path = Path(path)
    try:
        with opened(path, MAX_BYTES) as file:
            data = b"" if file.read(len(MAGIC)) == MAGIC else read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", REMEDY) from error
    found = _legacy(path, data) if data else _gguf(read(path))
    for name, values in found.entries.items():
        if not np.isfinite(values).all():
            raise InputError(path, f"an importance of {name} is not finite", REMEDY)
    return found


def _gguf(container: Container) -> Imatrix:
    """One count for each expert; what was never used counts as evenly important."""
    stored = {name: _floats(container, name) for name in container.tensors if name.endswith((SUMS, COUNTS))}
    entries = {}
    for name, sums in stored.items():
        if not name.endswith(SUMS):
            continue
        matrix = name.removesuffix(SUMS)
        counts = stored.get(matrix + COUNTS)
        if counts is None or sums.size % counts.size:
            raise InputError(container.path, f"the counts of {matrix} are missing or too many", REMEDY)
        whole = np.trunc(counts.astype(np.float64) + 0.5).astype(np.float32)[:, None]
        rows = sums.reshape(counts.size, -1)
        entries[matrix] = np.divide(rows, whole, out=np.ones_like(rows), where=whole > 0).reshape(-1)
    if not entries:
        raise InputError(container.path, "holds no importance matrix", REMEDY)
    chunks = container.metadata.get(CHUNKS, 0)
    return Imatrix(container.path, entries, chunks if isinstance(chunks, int) else 0)


def _floats(container: Container, name: str) -> Floats:
    """All numbers of a tensor in one row."""
    stored = container.tensors[name]
    if stored.type != GGMLQuantizationType.F32:
        raise InputError(container.path, f"{name} is stored as {stored.type.name} instead of F32", REMEDY)
    return container.rows(stored, 0, stored.nbytes // stored.row_bytes).reshape(-1).view("<f4").astype(np.float32)


def _legacy(path: Path, data: bytes) -> Imatrix:
    """int32 count of entries, each: length and bytes of the name, calls, count of values, f32 values; then chunks."""
    entries = {}
    try:
        (count,), position = struct.unpack_from("<i", data), 4
        for _ in range(count):
            (length,) = struct.unpack_from("<i", data, position)
            (raw,) = struct.unpack_from(f"{length}s", data, position + 4)
            calls, size = struct.unpack_from("<ii", data, position + 4 + length)
            position += 12 + length
            if size < 1:
                raise ValueError(f"an entry of {size} values")
            values = np.frombuffer(data, "<f4", size, position).astype(np.float32)
            position += values.nbytes
            entries[raw.decode("utf-8")] = values / np.float32(calls) if calls > 0 else values
    except (struct.error, ValueError) as error:
        raise InputError(path, "is no importance matrix, or is cut off", REMEDY) from error
    if not entries:
        raise InputError(path, "holds no importance matrix", REMEDY)
    (chunks,) = struct.unpack_from("<i", data, position) if len(data) >= position + 4 else (0,)
    return Imatrix(path, entries, chunks)
