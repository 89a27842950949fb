"""Makes the codebooks of the vector codec out of a sample of vectors, in PyTorch.

Each codebook is made by k-means of what the ones before leave over; then codes and all codebooks together improve by
turns. One thread and a fixed seed: the same sample gives the same codebooks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from gemexport.formats.grids.additive import Encoder, Indices
from gemexport.formats.grids.vector_codec import Codec
from gemexport.formats.tensor import Floats

SEED = 0
LLOYD, ROUNDS = 12, 6  # iterations of k-means for a codebook, and of codes and codebooks by turns
RIDGE = 0.1  # pull of a vector to where it was, in units of a vector that uses it


@dataclass(frozen=True)
class Fit:
    """Codebooks `[M, 2**B, V]` of f16 numbers, and their error on the sample, relative to its root mean square."""

    codebooks: Floats
    rms: float


def fit(vectors: Floats, codec: Codec) -> Fit:
    """Codebooks for a sample of vectors `[n, V]`."""
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
    codes = Encoder(centres[None].numpy())(data.numpy())
    return torch.from_numpy(codes[:, 0].astype(np.int64))


def _least_squares(data: torch.Tensor, codes: Indices, codebooks: torch.Tensor) -> torch.Tensor:
    """All codebooks at once for given codes: the vectors that leave the least squared error, near the old ones.

    Codebooks are determined up to vectors that one adds and another takes off; the ridge decides.
    """
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
    moved: torch.Tensor = torch.linalg.solve(together + ridge, sums - together @ old)
    return (old + moved).reshape(count, entries, length).float()


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread: how it divides sums among several would show in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
