"""The grid of every matrix of a checkpoint, stacked ones too, found once for all formats and kept beside the outputs.

Only the scales are kept (a thirty-second of the weights' number): with them, a weight's code is its nearest multiple.
Where codes were chosen otherwise, `choose` keeps these too. A tensor whose file has codes keeps that grid; beside it
goes a grid that every format holds, for those that cannot hold its own. The compiled loops are imported where they run:
Numba takes longer to import than an index to read.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.grids.recipe import Recipe, Scheme
from gemexport.formats.storage.bitpack import Words, pack, signed, unpack, words
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import atomic
from gemexport.formats.storage.parallel import by_rows
from gemexport.formats.tensor import Codes, DType, Floats, Grid, Rows, Tensor, TensorBase, holding, matrix_of, slices

if TYPE_CHECKING:
    from gemexport.formats.grids.lattice import Found

INDEX, SCALES, CODES = "grids.json", "scales.f32", "codes.u32"
# For formats that cannot hold a tensor's own grid: so fine that little is lost, in blocks that all of them have.
FALLBACK = Scheme(bits=8, group_size=32)


class GridRecord(BaseModel):
    """What was found out about one tensor of two axes or more."""

    model_config = ConfigDict(frozen=True)

    name: str
    lattice_fraction: float  # of the weights, on the best block
    lossless: bool
    bits: int | None = None  # None: the tensor has no grid and stays as it is
    block: int | None = None
    scale_dtype: DType | None = None
    offset: int = 0  # bytes into the scales file
    squared_error: float = 0.0  # sum of (w - code * scale)**2 / sum of w**2
    native: bool = False  # the file has codes of its own, and what else is said here is of the fallback
    codes: int | None = None  # bytes into the codes file, where codes are not the nearest ones
    left: bool = False  # an adapter was merged into it, which took it off the lattice that its base lies on


class GridIndex(BaseModel):
    """Everything `find_grids` found, and what it was found in."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    tensors: list[GridRecord]
    chosen: str = ""  # by what codes were chosen that are not the nearest ones; a digest

    def lattice_fraction(self) -> float:
        """Fraction of the matrices that lie wholly on a lattice."""
        return sum(record.lossless for record in self.tensors) / max(len(self.tensors), 1)


class GridTensor(TensorBase):
    """A tensor of the checkpoint together with its grid."""

    def __init__(self, base: Tensor, grid: Grid, scales: Floats, codes: Words | None = None) -> None:
        self.name, self.shape, self.dtype = base.name, base.shape, base.dtype
        self.grid: Grid | None = grid
        self._base, self._scales, self._codes = base, scales, codes

    def rows(self, start: int, stop: int) -> Rows:
        from gemexport.formats.grids.lattice import encode

        assert self.grid is not None
        values, bits = self._base.rows(start, stop).values, self.grid.bits
        scales = np.asarray(self._scales[start:stop])
        if self._codes is not None:
            packed = np.asarray(self._codes[start:stop])
            return Rows(values, lambda: signed(unpack(packed, bits, self.shape[-1]), bits), scales)
        return Rows(values, lambda: encode(values, scales, bits), scales)

    def scales(self, start: int, stop: int) -> Floats:
        """Scales of these rows by themselves, without looking at the weights."""
        return np.asarray(self._scales[start:stop])

    def numpy(self) -> Floats:
        return self._base.numpy()


def fingerprint(checkpoint: Checkpoint, settings: BaseModel) -> str:
    """A digest of what is found in a checkpoint with these settings: sizes and times of its files, config, adapter."""
    return hashlib.sha256((settings.model_dump_json() + checkpoint.facts()).encode()).hexdigest()


def find_grids(
    checkpoint: Checkpoint,
    folder: Path,
    recipe: Recipe,
    progress: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
) -> GridIndex:
    """Search every matrix for its lattice, quantize the plain ones as `recipe` says, and keep it in `folder`.

    `progress` is told the weights that were searched. Raises InputError, naming the tensor, for weights that are not
    finite. A folder that holds the grids of the same checkpoint and recipe already is used as it is.
    """
    mark = fingerprint(checkpoint, recipe)
    known = read_index(folder)
    if known is not None and known.fingerprint == mark:
        progress(sum(int(np.prod(checkpoint.tensors[record.name].shape)) for record in known.tensors))
        return known
    with atomic(folder) as partial:
        partial.mkdir()
        for tensor in checkpoint.tensors.values():
            if not _is_matrix(tensor):
                for bounds in slices(tensor):
                    _check_finite(tensor.rows(*bounds).values, tensor, checkpoint)
        with (partial / SCALES).open("wb") as file:
            found = []
            for record in _look(checkpoint, file, threads):
                found.append(record)
                progress(int(np.prod(checkpoint.tensors[record.name].shape)))
            found = [_compared_with_base(record, checkpoint, threads) for record in found]
            chosen = recipe.chosen(
                {record.name: None if record.native else record.lossless for record in found},
                {record.name for record in found if record.left},
            )
            found = [
                _round(checkpoint.tensors[record.name], record, chosen[record.name], file, threads)
                if record.name in chosen
                else record
                for record in found
            ]
        index = GridIndex(fingerprint=mark, tensors=found)
        (partial / INDEX).write_text(index.model_dump_json(indent=1), "utf-8")
    return index


def _compared_with_base(record: GridRecord, checkpoint: Checkpoint, threads: int | None) -> GridRecord:
    """The record of a tensor, which says so when an adapter took the tensor off a lattice."""
    from gemexport.formats.grids.lattice import search_all

    base = checkpoint.bases.get(record.name)
    if base is None or record.lossless:
        return record
    if base.grid is not None:
        return record.model_copy(update={"left": base.grid.lossless})
    left = all(part.on == part.weights for part in search_all([base], threads))
    return record.model_copy(update={"left": left})


def _is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor may lie on a grid: norms and scalars do not."""
    return len(tensor.shape) >= 2


def _check_finite(values: Floats, tensor: Tensor, checkpoint: Checkpoint) -> None:
    from gemexport.formats.grids.lattice import fault

    if kind := fault(values):
        raise _not_finite(checkpoint, tensor, kind)


def _not_finite(checkpoint: Checkpoint, tensor: Tensor, kind: str) -> InputError:
    return InputError(checkpoint.path, f"tensor {tensor.name} has {kind} weights", "repair or retrain the checkpoint")


def _look(checkpoint: Checkpoint, file: BinaryIO, threads: int | None) -> Iterator[GridRecord]:
    """A record for every matrix, those with codes of their own first; scales go to the end of `file`."""
    from gemexport.formats.grids.lattice import search_all

    matrices = [tensor for tensor in checkpoint.tensors.values() if _is_matrix(tensor)]
    for tensor in matrices:
        if tensor.grid is not None:
            yield _keep(tensor, file, checkpoint, threads)
    found = search_all([tensor for tensor in matrices if tensor.grid is None], threads)
    for name, parts in groupby(found, key=lambda part: part.tensor.name):
        yield _record(checkpoint, name, parts, file)


def _record(checkpoint: Checkpoint, name: str, parts: Iterable[Found], file: BinaryIO) -> GridRecord:
    """One searched tensor; its scales stay in `file` when all of it lies on the lattice."""
    offset, weights, on, bits, block = file.tell(), 0, 0, 2, 0
    dtypes: tuple[DType, ...] = ("bf16", "f16")
    for part in parts:
        if part.fault:
            raise _not_finite(checkpoint, part.tensor, part.fault)
        weights, on, bits, block = weights + part.weights, on + part.on, max(bits, part.bits), part.block
        dtypes = holding(part.scales, dtypes)
        file.write(part.scales.data)
    if on == weights:
        return GridRecord(
            name=name,
            lattice_fraction=1.0,
            lossless=True,
            bits=bits,
            block=block,
            scale_dtype=next(iter(dtypes), "f32"),
            offset=offset,
        )
    file.seek(offset)
    file.truncate()
    return GridRecord(name=name, lattice_fraction=on / weights, lossless=False)


def _keep(tensor: Tensor, file: BinaryIO, checkpoint: Checkpoint, threads: int | None) -> GridRecord:
    """A tensor with codes of its own; the fallback's scales go to the end of `file` where a format may want them."""

    def scales(bounds: tuple[int, int]) -> Floats:
        rows = tensor.rows(*bounds)
        assert rows.scales is not None
        return rows.scales if rows.shifts is None else np.stack([rows.scales, rows.shifts])

    for part in by_rows(scales, tensor, threads):
        _check_finite(part, tensor, checkpoint)
    record = GridRecord(name=tensor.name, lattice_fraction=1.0, lossless=True, native=True)
    assert tensor.grid is not None
    return record if held_everywhere(tensor.grid) else _round(tensor, record, FALLBACK, file, threads)


def held_everywhere(grid: Grid) -> bool:
    """Whether every format has a container for the grid, its scales perhaps rounded."""
    return grid.kind == "symmetric" and grid.bits in (2, 4, 8) and grid.block % FALLBACK.group_size == 0


def _round(tensor: Tensor, record: GridRecord, scheme: Scheme, file: BinaryIO, threads: int | None) -> GridRecord:
    """Scales of `scheme` for a tensor; none, and the record as it is, when its rows do not divide."""
    if tensor.shape[-1] % scheme.group_size:
        return record
    offset, error, energy = file.tell(), 0.0, 0.0
    for scales, part, whole in by_rows(lambda bounds: _fit_slice(tensor, bounds, scheme), tensor, threads):
        file.write(scales.data)
        error, energy = error + part, energy + whole
    return record.model_copy(
        update={
            "bits": scheme.bits,
            "block": scheme.group_size,
            "scale_dtype": "f16",
            "offset": offset,
            "squared_error": error / energy if energy else 0.0,
        }
    )


def _fit_slice(tensor: Tensor, bounds: tuple[int, int], scheme: Scheme) -> tuple[Floats, float, float]:
    """Scales of a slice of rows, its squared error and its energy."""
    from gemexport.formats.grids.lattice import encode
    from gemexport.formats.grids.rounding import fit

    values = tensor.rows(*bounds).values
    scales = fit(values, scheme.group_size, scheme.bits)
    codes = encode(values, scales, scheme.bits)
    difference = values - codes * np.repeat(scales, scheme.group_size, axis=1)
    return (
        scales,
        float(np.square(difference, dtype=np.float64).sum()),
        float(np.square(values, dtype=np.float64).sum()),
    )


def allocate(
    checkpoint: Checkpoint, source: Path, folder: Path, mark: str, schemes: Mapping[str, Scheme | None]
) -> GridIndex:
    """Keep in `folder` the grids of `source`, with other schemes for tensors that lie on no lattice; None: no grid.

    A folder that was made under the same `mark` is used as it is, with the codes that were chosen in it since.
    """
    known, index = read_index(folder), read_index(source)
    if known is not None and known.fingerprint == mark:
        return known
    assert index is not None
    with atomic(folder) as partial:
        partial.mkdir()
        shutil.copyfile(source / SCALES, partial / SCALES)
        with (partial / SCALES).open("ab") as file:
            records = [
                _again(checkpoint.tensors[record.name], record, schemes[record.name], file)
                if record.name in schemes
                else record
                for record in index.tensors
            ]
        index = GridIndex(fingerprint=mark, tensors=records)
        (partial / INDEX).write_text(index.model_dump_json(indent=1), "utf-8")
    return index


def _again(tensor: Tensor, record: GridRecord, scheme: Scheme | None, file: BinaryIO) -> GridRecord:
    """The record of a plain tensor in another scheme, whose scales go to the end of `file`."""
    plain = {"bits": None, "block": None, "scale_dtype": None, "codes": None, "offset": 0, "squared_error": 0.0}
    bare = record.model_copy(update=plain)
    return bare if scheme is None else _round(tensor, bare, scheme, file, None)


Chosen = tuple[str, Iterable[tuple[Codes, Floats]]]  # a tensor's name; codes and scales of its rows, slice by slice


def choose(folder: Path, mark: str, chosen: Iterable[Chosen]) -> GridIndex:
    """Keep codes and scales that were chosen for tensors in place of the nearest codes; `mark` says by what.

    They are of the bits and the block that the tensor has there, the scales f16 numbers. When the block ends badly,
    what lay in `folder` stays.
    """
    index = read_index(folder)
    assert index is not None
    records = {record.name: record for record in index.tensors}
    with atomic(folder) as partial:
        partial.mkdir()
        shutil.copyfile(folder / SCALES, partial / SCALES)
        with (partial / SCALES).open("ab") as scales_file, (partial / CODES).open("wb") as codes_file:
            for name, parts in chosen:
                record = records[name]
                assert record.bits is not None
                at = {"offset": scales_file.tell(), "codes": codes_file.tell()}
                for codes, scales in parts:
                    scales_file.write(np.ascontiguousarray(scales, "<f4").data)
                    codes_file.write(pack(codes, record.bits).data)
                records[name] = record.model_copy(update=at)
        index = index.model_copy(update={"tensors": list(records.values()), "chosen": mark})
        (partial / INDEX).write_text(index.model_dump_json(indent=1), "utf-8")
    return index


def read_index(folder: Path) -> GridIndex | None:
    """The index that `find_grids` left in `folder`, if it is there and whole."""
    try:
        return GridIndex.model_validate_json((folder / INDEX).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def attach(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with the grids that `find_grids` left in `folder` on its matrices."""
    index = read_index(folder)
    if index is None:
        raise InputError(folder, "there are no grids", "run the export again with --fresh")
    tensors = dict(checkpoint.tensors)
    fallbacks: dict[str, Tensor] = {}
    for record in index.tensors:
        if record.bits is None or record.block is None or record.scale_dtype is None:
            continue
        base = tensors[record.name]
        count, width = matrix_of(base.shape)
        scales = np.memmap(
            folder / SCALES, dtype="<f4", mode="r", offset=record.offset, shape=(count, width // record.block)
        )
        lossless, codes = record.lossless and not record.native, None
        if record.codes is not None:
            packed = (count, words(width, record.bits))
            codes = np.memmap(folder / CODES, dtype="<u4", mode="r", offset=record.codes, shape=packed)
        found = GridTensor(base, Grid(record.bits, record.block, record.scale_dtype, lossless), scales, codes)
        (fallbacks if record.native else tensors)[record.name] = found
    return replace(checkpoint, tensors=tensors, fallbacks=fallbacks)
