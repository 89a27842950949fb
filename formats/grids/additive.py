"""A vector codec: each vector of consecutive weights is a sum of vectors, one out of each of a few codebooks.

    w[row, V * i + v] = scale[row, V * i // block] * sum over m of codebooks[m, codes[row, i, m], v]

This is the layout of AQLM (https://arxiv.org/abs/2401.06118). `vector_codec` spells it, `additive_fit` makes codebooks;
here is what codes mean, and how they are found.
"""

from __future__ import annotations

from typing import Protocol

import numba
import numpy as np
from numpy.typing import NDArray

from gemexport.formats.grids.vector_codec import Codec
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import Codes, DType, Floats, Grid, Rows, TensorBase, on_grid

Indices = NDArray[np.uint8]
BROKEN = "export or download it again"
jit = numba.njit(cache=True, nogil=True, error_model="numpy")
# No number here is NaN, and of several minima the first counts either way: these loops may be vectorised.
reduction = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"nnan", "nsz", "contract"})


class StoredCodes(Protocol):
    """Codes `[rows, in / V, M]`, uint8: an array, or what gives slices of rows as one would."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice) -> Indices: ...


class AdditiveTensor(TensorBase):
    """A matrix `[out, in]` of such codes, wherever they are stored.

    `codes` are `[out, in / V, M]`, `codebooks` `[M, 2**B, V]`, `scales` `[out, in / block]` in f16 or f32. `rows` gives
    codes and scales as they are, and the float32 values nearest to what they stand for. Raises InputError for arrays
    that do not fit together, and for a code that is in no codebook.
    """

    dtype: DType = "f32"
    requantized = True  # its codes were fitted to somebody else's values

    def __init__(
        self,
        name: str,
        codec: Codec,
        codes: StoredCodes,
        codebooks: Floats,
        scales: NDArray[np.floating],
        fitted_rms: float | None = None,
    ) -> None:
        self.name, self.fitted_rms = name, fitted_rms
        self._codes, self._scales = codes, scales
        whole = len(codes.shape) == 3 and codes.shape[2] == codec.codebooks and codes.shape[0] == scales.shape[0]
        if not whole or codebooks.shape != (codec.codebooks, codec.entries, codec.vector):
            raise InputError(name, f"its codes and codebooks are not those of {codec}", BROKEN)
        self.shape: tuple[int, ...] = (codes.shape[0], codes.shape[1] * codec.vector)
        if scales.ndim != 2 or not scales.shape[1] or codes.shape[1] % scales.shape[1]:
            raise InputError(name, "its vectors lie in more than one block of a scale", BROKEN)
        self.grid = Grid(
            codec.bits,
            self.shape[1] // scales.shape[1],
            "f16" if scales.dtype == np.float16 else "f32",
            lossless=True,
            kind="vectors",
            levels=tuple(codebooks.reshape(-1).tolist()),
            vector=codec.vector,
            codebooks=codec.codebooks,
        )

    def rows(self, start: int, stop: int) -> Rows:
        codes, scales = np.asarray(self._codes[start:stop]), np.asarray(self._scales[start:stop], np.float32)
        if codes.max(initial=0) >= 1 << self.grid.bits:
            raise InputError(self.name, "a code is in no codebook", BROKEN)
        return on_grid(self.grid, codes, scales)


def evaluate(codes: Codes, codebooks: Floats, scales: Floats) -> NDArray[np.float64]:
    """What codes `[rows, in / V, M]` stand for, `[rows, in]`, in float64; shapes as in `AdditiveTensor`.

    f16 numbers of a codebook are added without rounding unless they are 2**42 times apart; times a scale it is one
    rounding at most.
    """
    values = np.empty((codes.shape[0], codes.shape[1] * codebooks.shape[2]))
    _evaluate(codes, codebooks.astype(np.float64), scales, values)
    return values


@jit
def _evaluate(
    codes: Codes, codebooks: NDArray[np.float64], scales: NDArray[np.float32], values: NDArray[np.float64]
) -> None:
    vector = codebooks.shape[2]
    block = values.shape[1] // scales.shape[1]
    for row in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            scale = np.float64(scales[row, i * vector // block])
            for v in range(vector):
                total = 0.0
                for m in range(codes.shape[2]):
                    total += codebooks[m, codes[row, i, m], v]
                values[row, i * vector + v] = scale * total


BEAM = 4  # partial sums that the search keeps


class Encoder:
    """Looks for the codes of vectors: of each codebook in turn, the `beam` best sums so far are kept."""

    def __init__(self, codebooks: Floats, beam: int = BEAM) -> None:
        self._turned = np.ascontiguousarray(codebooks.transpose(0, 2, 1), np.float32)  # [M, V, 2**B]
        exact = codebooks.astype(np.float64)
        self._halves = (np.square(exact).sum(axis=2) / 2).astype(np.float32)
        # [M, M, 2**B, 2**B]: of each codebook with those before it, so that the new codes lie side by side.
        self._products = np.ascontiguousarray(np.einsum("iav,jbv->jiab", exact, exact), np.float32)
        self._beam = beam

    def __call__(self, vectors: Floats) -> Indices:
        """The codes `[n, M]` of vectors `[n, V]`, which must be finite."""
        codes = np.empty((vectors.shape[0], self._halves.shape[0]), np.uint8)
        _search(np.ascontiguousarray(vectors), self._turned, self._halves, self._products, self._beam, codes)
        return codes


@reduction
def _search(
    vectors: Floats,
    codebooks: NDArray[np.float32],
    halves: NDArray[np.float32],
    products: NDArray[np.float32],
    beam: int,
    codes: Indices,
) -> None:
    """Beam search for the least |x - y|² / 2 - |x|² / 2 = |y|² / 2 - <x, y> over sums y of a vector a codebook.

    The distance of a longer sum is that of the shorter one, plus the new vector's own part, plus its products with the
    vectors before it, all of which were computed for the codebooks once.
    """
    count, entries = halves.shape
    own, total = np.empty(entries, np.float32), np.empty(entries, np.float32)
    # The best sums so far: distances and codes, and of those one vector longer which sum each continues, and how.
    score, path = np.empty(beam, np.float32), np.empty((beam, count), np.uint8)
    new_score, new_path = np.empty(beam, np.float32), np.empty((beam, count), np.uint8)
    parent, code = np.empty(beam, np.int64), np.empty(beam, np.int64)
    for n in range(vectors.shape[0]):
        kept = 1
        score[0] = 0
        for m in range(count - 1):
            _alone(vectors[n], codebooks[m], halves[m], own)
            found = 0
            for b in range(kept):
                low = _together(own, path[b], products[m], m, total) + score[b]
                if found < beam or low < new_score[beam - 1]:
                    found = _keep_best(total, score[b], b, found, new_score, parent, code)
            for b in range(found):
                score[b] = new_score[b]
                for j in range(m):
                    new_path[b, j] = path[parent[b], j]
                new_path[b, m] = code[b]
            for b in range(found):
                for j in range(m + 1):
                    path[b, j] = new_path[b, j]
            kept = found
        last = count - 1
        _alone(vectors[n], codebooks[last], halves[last], own)
        best = np.float32(np.inf)
        for b in range(kept):
            low = _together(own, path[b], products[last], last, total)
            if low + score[b] < best:
                best = low + score[b]
                for j in range(last):
                    codes[n, j] = path[b, j]
                codes[n, last] = _place(total, low)


@jit
def _keep_best(
    total: Floats,
    before: np.float32,
    sum_: int,
    found: int,
    score: Floats,
    parent: NDArray[np.int64],
    code: NDArray[np.int64],
) -> int:
    """Work one sum's continuations, at `before` + `total`, into the `found` best so far, in order; their number."""
    room = score.size
    for k in range(total.size):
        value = total[k] + before
        if found < room or value < score[room - 1]:
            place = min(found, room - 1)
            found = min(found + 1, room)
            while place > 0 and score[place - 1] > value:
                score[place], parent[place], code[place] = score[place - 1], parent[place - 1], code[place - 1]
                place -= 1
            score[place], parent[place], code[place] = value, sum_, k
    return found


@reduction
def _alone(vector: Floats, codebook: NDArray[np.float32], halves: NDArray[np.float32], own: Floats) -> None:
    """|y|² / 2 - <x, y> for each vector y of a codebook `[V, entries]`."""
    for k in range(own.size):
        own[k] = halves[k]
    pairs = vector.size // 2
    for pair in range(pairs):  # two at a time: what is loaded and stored costs more than the products
        first, second = vector[2 * pair], vector[2 * pair + 1]
        for k in range(own.size):
            own[k] -= first * codebook[2 * pair, k] + second * codebook[2 * pair + 1, k]
    if vector.size % 2:
        for k in range(own.size):
            own[k] -= vector[vector.size - 1] * codebook[vector.size - 1, k]


@reduction
def _together(own: Floats, path: Indices, products: NDArray[np.float32], length: int, total: Floats) -> np.float32:
    """What each vector of the next codebook adds to the distance of a sum of `length` vectors, and the least of it."""
    if length == 0:
        for k in range(own.size):
            total[k] = own[k]
    else:
        product = products[0, path[0]]
        for k in range(own.size):
            total[k] = own[k] + product[k]
    for j in range(1, length):
        product = products[j, path[j]]
        for k in range(own.size):
            total[k] += product[k]
    low = np.float32(total[0])
    for k in range(own.size):
        low = min(low, total[k])
    return low


@jit
def _place(values: Floats, wanted: np.float32) -> int:
    """Where the first of the values is that equals `wanted`; it is among them."""
    place = 0
    while values[place] != wanted:
        place += 1
    return place
