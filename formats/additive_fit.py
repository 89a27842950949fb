"""Fits the vector codec of `additive` to a checkpoint's per-layer embeddings, once for all formats, beside the outputs.

Codebooks are made in PyTorch out of a sample: k-means on what the ones before leave over, then by turns codes and all
codebooks together. Codes are then looked for slice by slice, so that a table of gigabytes is never in memory, and each
scale is the best one for the codes that were found. The same table gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from gemexport.formats.additive import AdditiveTensor, Encoder, Indices, evaluate
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.errors import InputError
from gemexport.formats.files import atomic
from gemexport.formats.grids import fingerprint
from gemexport.formats.parallel import ordered
from gemexport.formats.tensor import Floats, Tensor, round_to, slices
from gemexport.formats.vector_codec import Codec, check

if TYPE_CHECKING:
    import torch

NAME = "model.embed_tokens_per_layer.weight"
RECORD, CODES, SCALES, CODEBOOKS = "fitted.json", "codes.u8", "scales.f32", "codebooks.f16"
SEED = 0
SAMPLED_ROWS, SAMPLED_VECTORS = 4096, 1 << 16
LLOYD, ROUNDS = 12, 6  # iterations of k-means for a codebook, and of codes and codebooks by turns
RIDGE = 0.1  # pull of a vector to where it was, in units of a vector that uses it


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


@dataclass(frozen=True)
class Fit:
    """Codebooks `[M, 2**B, V]` of f16 numbers, and their error on the sample, relative to its root mean square."""

    codebooks: Floats
    rms: float


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
    tensor = checkpoint.tensors[NAME]
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
    _check_torch()
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


def fit(vectors: Floats, codec: Codec) -> Fit:
    """Codebooks for a sample of vectors `[n, V]`."""
    import torch

    with _one_thread():
        data = torch.from_numpy(vectors)
        generator = torch.Generator().manual_seed(SEED)
        books: list[torch.Tensor] = []
        rest = data
        for _ in range(codec.codebooks):
            books.append(k_means(rest, codec.entries, generator))
            rest = rest - books[-1][_nearest(rest, books[-1])]
        best = _measured(vectors, torch.stack(books))
        for _ in range(ROUNDS if codec.codebooks > 1 and len(vectors) else 0):
            codes = Encoder(best.codebooks)(vectors)
            better = _measured(vectors, _least_squares(data, codes, torch.from_numpy(best.codebooks)))
            if better.rms >= best.rms:
                break
            best = better
    return best


def _measured(vectors: Floats, codebooks: torch.Tensor) -> Fit:
    """Codebooks as f16 holds them, and their error on the vectors."""
    stored = codebooks.half().float().numpy()
    codes = Encoder(stored)(vectors)
    sums = sum(book[codes[:, m]].astype(np.float64) for m, book in enumerate(stored))
    energy = float(np.square(vectors, dtype=np.float64).sum())
    return Fit(stored, math.sqrt(float(np.square(vectors - sums).sum()) / energy) if energy else 0.0)


def k_means(data: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` centres for vectors `[n, V]`, by Lloyd's iterations from a random choice of them.

    A centre that nothing is near to moves to the vector that is farthest from its own.
    """
    import torch

    if not len(data):
        return torch.zeros(count, data.shape[1])
    order = torch.randperm(len(data), generator=generator)
    centres = data[order.repeat(-(-count // len(data)))[:count]].clone()
    for _ in range(LLOYD):
        own = _nearest(data, centres)
        used = torch.bincount(own, minlength=count)
        sums = torch.zeros(count, data.shape[1], dtype=torch.float64).index_add_(0, own, data.double())
        centres = torch.where(used[:, None] > 0, sums / used.clamp(min=1)[:, None], centres.double()).float()
        unused = torch.nonzero(used == 0).flatten()
        if len(unused):
            distances = (data - centres[own]).square().sum(1)
            farthest = torch.argsort(distances, descending=True, stable=True)[: len(unused)]
            centres[unused[: len(farthest)]] = data[farthest]
    return centres


def _nearest(data: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The index of the centre nearest to each vector."""
    import torch

    codes = Encoder(centres[None].numpy())(data.numpy())
    return torch.from_numpy(codes[:, 0].astype(np.int64))


def _least_squares(data: torch.Tensor, codes: Indices, codebooks: torch.Tensor) -> torch.Tensor:
    """All codebooks at once for given codes: the vectors that leave the least squared error, near the old ones.

    Codebooks are determined up to vectors that one adds and another takes off; the ridge decides.
    """
    import torch

    count, entries, length = codebooks.shape
    places = torch.from_numpy(codes.astype(np.int64)) + torch.arange(count) * entries
    size = count * entries
    pairs = (places[:, :, None] * size + places[:, None, :]).flatten()
    together = torch.bincount(pairs, minlength=size * size).reshape(size, size).double()
    sums = torch.zeros(size, length, dtype=torch.float64)
    for m in range(count):
        sums.index_add_(0, places[:, m], data.double())
    old = codebooks.reshape(size, length).double()
    ridge = RIDGE * torch.eye(size, dtype=torch.float64)
    moved = torch.linalg.solve(together + ridge, sums - together @ old)
    better: torch.Tensor = (old + moved).reshape(count, entries, length).float()
    return better


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread: how it divides sums among several would show in the last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_torch() -> None:
    if find_spec("torch") is None:
        raise InputError("--ple-codec", "needs PyTorch", "pip install 'gemexport[reference]'")
