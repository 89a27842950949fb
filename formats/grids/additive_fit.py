"""Fits the vector codec of `additive` to a checkpoint's per-layer embeddings, once for all formats, beside the outputs.

`codebooks` makes these out of a sample. Codes are then looked for slice by slice, so that a table of gigabytes is never
in memory, and each scale is the best one for the codes that were found. The same table gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.names import PER_LAYER_EMBEDDING
from gemexport.formats.grids.additive import AdditiveTensor, Encoder, Indices, evaluate
from gemexport.formats.grids.search import fingerprint
from gemexport.formats.grids.vector_codec import Codec, check
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import atomic
from gemexport.formats.storage.installing import install
from gemexport.formats.storage.parallel import ordered
from gemexport.formats.tensor import Floats, Tensor, round_to, slices

RECORD, CODES, SCALES, CODEBOOKS = "fitted.json", "codes.u8", "scales.f32", "codebooks.f16"
SAMPLED_ROWS, SAMPLED_VECTORS = 4096, 1 << 16


class Record(BaseModel):
    """What a fit was made of, and what it measured."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    name: str
    codec: Codec
    shape: tuple[int, int]
    block: int
    halves: bool  # every scale is an f16 number
    rms: float  # sqrt of sum of (w - coded w)**2 / sum of w**2


def find_codec(
    checkpoint: Checkpoint,
    folder: Path,
    codec: Codec,
    progress: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
) -> Record:
    """Fit `codec` to the per-layer embeddings and keep codebooks, codes and scales in `folder`; progress in weights.

    A folder that holds the fit to the same checkpoint already is used as it is. Raises InputError for a checkpoint
    without per-layer embeddings, and for vectors that do not divide what a layer has of a row.
    """
    layers = check(codec, checkpoint.architecture.per_layer, checkpoint.path)
    mark, known = fingerprint(checkpoint, codec), read_record(folder)
    tensor = checkpoint.tensors[PER_LAYER_EMBEDDING]
    if known is not None and known.fingerprint == mark:
        progress(math.prod(known.shape))
        return known
    with atomic(folder) as partial:
        partial.mkdir()
        return write_fit(tensor, partial, codec, layers.dim, mark, progress, threads)


def write_fit(
    tensor: Tensor,
    folder: Path,
    codec: Codec,
    block: int,
    mark: str = "",
    progress: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
) -> Record:
    """Fit `codec` to a matrix, with a scale for each `block` weights of a row, and write it to the folder."""
    try:
        from gemexport.formats.grids.codebooks import fit
    except ModuleNotFoundError as missing:
        raise InputError("--ple-codec", f"needs {missing.name}", install("reference")) from missing
    codebooks = fit(sample(tensor, codec, block), codec).codebooks
    codebooks.astype("<f2").tofile(folder / CODEBOOKS)
    encoder, halves, error, energy = Encoder(codebooks), True, 0.0, 0.0

    def coded(bounds: tuple[int, int]) -> tuple[Indices, Floats, float, float]:
        values = tensor.rows(*bounds).values
        codes, scales = encode(values, codebooks, encoder, block)
        exact = values.astype(np.float64)
        lost = exact - evaluate(codes, codebooks, scales).astype(np.float32)
        return codes, scales, float(np.square(lost).sum()), float(np.square(exact).sum())

    with (folder / CODES).open("wb") as code_file, (folder / SCALES).open("wb") as scale_file:
        for codes, scales, part, whole in ordered(coded, slices(tensor, 4 << 20), threads):
            code_file.write(codes.data)
            scale_file.write(scales.data)
            halves = halves and np.array_equal(round_to(scales, "f16"), scales)
            error, energy = error + part, energy + whole
            progress(codes.shape[0] * tensor.shape[1])
    record = Record(
        fingerprint=mark, name=tensor.name, codec=codec, shape=(tensor.shape[0], tensor.shape[1]), block=block,
        halves=halves, rms=math.sqrt(error / energy) if energy else 0.0,
    )  # fmt: skip
    (folder / RECORD).write_text(record.model_dump_json(indent=1), "utf-8")
    return record


def read_record(folder: Path) -> Record | None:
    """The record that `find_codec` left in `folder`, if it is there and whole."""
    try:
        return Record.model_validate_json((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def read_fit(folder: Path) -> AdditiveTensor:
    """The coded matrix that `find_codec` left in `folder`, mapped."""
    record = read_record(folder)
    if record is None:
        raise InputError(folder, "there is no vector codec", "run the export again with --fresh")
    codec, (out, width) = record.codec, record.shape
    shape = (codec.codebooks, codec.entries, codec.vector)
    codebooks = np.fromfile(folder / CODEBOOKS, "<f2").reshape(shape).astype(np.float32)
    codes = np.memmap(folder / CODES, np.uint8, "r", shape=(out, width // codec.vector, codec.codebooks))
    stored = np.memmap(folder / SCALES, "<f4", "r", shape=(out, width // record.block))
    scales: NDArray[np.floating] = stored.astype(np.float16) if record.halves else stored
    return AdditiveTensor(record.name, codec, codes, codebooks, scales, record.rms)


def attach(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with the coded per-layer embeddings of `folder` in place of its own."""
    found = read_fit(folder)
    return replace(checkpoint, tensors={**checkpoint.tensors, found.name: found})


def encode(values: Floats, codebooks: Floats, encoder: Encoder, block: int) -> tuple[Indices, Floats]:
    """Codes `[rows, in / V, M]` and scales `[rows, in / block]` for rows of values."""
    rows, width = values.shape
    sizes = root_mean_squares(values, block)
    vectors = (values.reshape(*sizes.shape, block) / np.where(sizes > 0, sizes, 1)[..., None]).astype(np.float32)
    codes = encoder(vectors.reshape(-1, codebooks.shape[2])).reshape(rows, width // codebooks.shape[2], -1)
    # The scale that is best for these codes, <w, y> / <y, y>: a sum of vectors tends to be too short.
    sums = evaluate(codes, codebooks, np.ones((rows, 1), np.float32)).reshape(*sizes.shape, block)
    powers = np.square(sums).sum(axis=-1)
    products = (values.reshape(*sizes.shape, block) * sums).sum(axis=-1)
    exact = np.divide(products, powers, out=np.zeros_like(powers), where=(powers > 0) & (sizes > 0))
    return codes, _narrowed(exact.astype(np.float32))


def _narrowed(scales: Floats) -> Floats:
    """Scales rounded to f16, those excepted that it would not hold to eleven bits."""
    rounded = round_to(scales, "f16")
    near = np.abs(rounded - scales) <= np.abs(scales) * np.float32(2.0**-11)
    return np.where(near, rounded, scales)


def root_mean_squares(values: Floats, block: int) -> NDArray[np.float64]:
    """Of each block of each row, `[rows, in / block]`."""
    blocks = values.reshape(values.shape[0], -1, block).astype(np.float64)
    return np.asarray(np.sqrt(np.square(blocks).mean(axis=-1)))


def sample(tensor: Tensor, codec: Codec, block: int) -> Floats:
    """Vectors `[n, V]` out of rows that are spread evenly over a matrix, each block of them of root mean square 1."""
    chosen = np.unique(np.linspace(0, tensor.shape[0] - 1, min(SAMPLED_ROWS, tensor.shape[0])).astype(np.int64))
    share = max(1, -(-chosen.size * (tensor.shape[1] // codec.vector) // SAMPLED_VECTORS))
    found = []
    for number, row in enumerate(chosen):
        values = tensor.rows(int(row), int(row) + 1).values
        sizes = root_mean_squares(values, block)
        blocks = values.reshape(*sizes.shape, block) / np.where(sizes > 0, sizes, 1)[..., None]
        vectors = blocks.astype(np.float32).reshape(-1, codec.vector)[number % share :: share]
        found.append(vectors[np.any(vectors != 0, axis=1)])
    return np.concatenate(found)
