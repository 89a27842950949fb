"""Codes that are chosen together: each weight's error is made up for by those that are rounded after it.

What counts is not how near a row's weights come but what the row makes of the inputs that it meets: with H the sum of
the inputs' outer products, the error of weights that are off by d is d H d'. Weights are rounded one column after the
other, and what one is off by is put on those that follow, as GPTQ does (Frantar et al. 2022, arXiv:2210.17323). With
H = R R' and R upper triangular no inverse is needed: d H d' is the squared length of d R, and rounding is finding a
near point of the lattice that R spans, by Babai's nearest plane (Chen et al. 2025, arXiv:2507.18553).

Grids are those of `rounding`, signed codes and a scale for each block, but scales are numbers of both bf16 and f16:
codes make up for what the rounding of a scale costs, and no format rounds it once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.grids.lattice import jit, nearest
from gemexport.formats.tensor import Codes, Floats, round_to

DAMPING = 0.01  # of the mean of H's diagonal, added to it: inputs that calibration never saw
# The same of a head whose rows are looked up as well: as embeddings they meet nothing, and what they are off by counts
# in every direction alike (docs/recipes.md).
TIED_DAMPING = 0.1
COLUMNS = 128  # that are rounded before what they are off by is put on all others
PANEL, STRIP = 256, 1024  # columns of the factor that are found at a time, and rows of what is taken off them
STARTS = 15  # scales that are tried in each direction of a block's largest weight


@dataclass(frozen=True)
class Inputs:
    """What a matrix is multiplied with, as far as rounding asks: H and its factor, columns in the order of rounding."""

    gram: Floats  # `[in, in]`: H, damped, in the order of the tensor
    factor: Floats  # `[in, in]`: R, each column divided by its element on the diagonal, in the order of rounding
    order: NDArray[np.intp]  # columns by what they weigh, the heaviest first

    @classmethod
    def of(cls, gram: Floats, damping: float = DAMPING) -> Inputs:
        """From H, `[in, in]`, the sum of the outer products of all inputs; H is damped in place.

        Memory: the factor, as large as H, and a strip of some megabytes.
        """
        diagonal = np.einsum("ii->i", gram)
        diagonal += max(damping * float(diagonal.mean(dtype=np.float64)), float(np.finfo(np.float32).tiny))
        order = np.argsort(-diagonal, kind="stable")
        factor = gram[np.ix_(order, order)]
        _factorize(factor)
        factor /= np.diagonal(factor).copy()
        return cls(gram, factor, order)


def fit(values: Floats, inputs: Inputs, block: int, bits: int, rounds: int = 1) -> tuple[Codes, Floats]:
    """Codes `[rows, in]` and scales `[rows, in // block]` for `values` `[rows, in]`.

    Scales are those of least squares, weights counted by what they are multiplied with; `rounds` times they are then
    made those of least squares for the codes that were found, in H, and the codes found again.
    """
    values = np.ascontiguousarray(values, np.float32)
    scales = _scales(values, np.ascontiguousarray(np.diagonal(inputs.gram)), block, bits)
    codes = _codes(values, inputs, scales, block, bits)
    for _ in range(rounds):
        scales = _refit(values, inputs.gram, codes, scales, block)
        codes = _codes(values, inputs, scales, block, bits)
    return codes.astype(np.int8), scales


def error(values: Floats, inputs: Inputs, codes: Codes, scales: Floats) -> float:
    """The sum over rows of d H d', where d is what codes on scales are off by."""
    block = values.shape[1] // scales.shape[1]
    off = values - codes * np.repeat(scales, block, axis=1)
    return float(np.einsum("ij,ij->", off @ inputs.gram, off, dtype=np.float64))


def _factorize(gram: Floats) -> None:
    """Put R, upper triangular, in the place of R R', in panels of columns from the last to the first.

    Numbers are kept in f32 and computed with in f64: what rounding R does to R R' stays far below any damping, where a
    factorization in f32 may meet a square that is negative.
    """
    size = len(gram)
    for stop in range(size, 0, -PANEL):
        start = max(0, stop - PANEL)
        known = gram[start:stop, stop:].astype(np.float64).T
        square = gram[start:stop, start:stop] - gram[start:stop, stop:] @ known
        corner = np.linalg.cholesky(square[::-1, ::-1])[::-1, ::-1]
        inverse = np.linalg.inv(corner).T
        for first in range(0, start, STRIP):
            rows = slice(first, min(first + STRIP, start))
            left = gram[rows, start:stop] - gram[rows, stop:].astype(np.float64) @ known
            gram[rows, start:stop] = left @ inverse
        gram[start:stop, start:stop] = corner
        gram[stop:, start:stop] = 0


@jit
def _search(values: Floats, weights: Floats, block: int, bits: int, scales: Floats) -> None:
    """Of scales that put a block's largest weight near either end of the codes, the best after a step of least squares.

    The error of a scale is the weighted one; its least-squares scale is `cross / square`, and explains their product.
    """
    low, high = -float(1 << (bits - 1)), float((1 << (bits - 1)) - 1)
    for row in range(scales.shape[0]):
        for b in range(scales.shape[1]):
            first, peak = b * block, 0.0
            for i in range(first, first + block):
                if abs(values[row, i]) > abs(peak):
                    peak = values[row, i]
            best, explained = 0.0, 0.0
            for start in range(2 * STARTS if peak != 0 else 0):
                shift = 4.5 * (start // 2) / (STARTS - 1) - 1.5
                inverse = (low + shift if start % 2 else high - shift) / peak
                cross, square = 0.0, 0.0
                for i in range(first, first + block):
                    code = nearest(min(max(values[row, i] * inverse, low), high))
                    cross += weights[i] * code * values[row, i]
                    square += weights[i] * code * code
                if square > 0 and cross * cross > explained * square:
                    best, explained = cross / square, cross * cross / square
            scales[row, b] = best


def _scales(values: Floats, weights: Floats, block: int, bits: int) -> Floats:
    scales = np.empty((len(values), values.shape[1] // block), np.float32)
    _search(values, weights, block, bits, scales)
    return _held(scales)


def _held(scales: Floats) -> Floats:
    """Scales rounded to bf16, and so that f16 holds them as well: some formats have the one, some the other."""
    return round_to(round_to(scales, "bf16"), "f16")


@jit
def _round(
    values: Floats, scales: Floats, blocks: NDArray[np.intp], factor: Floats, carried: Floats, bits: int, off: Floats
) -> None:
    """Round some columns one after the other; all arrays are of these columns alone, in the order of rounding.

    `carried` `[rows, columns]` is what those before them put on them, `off` gets what each is off by.
    """
    low, high = -float(1 << (bits - 1)), float((1 << (bits - 1)) - 1)
    columns = values.shape[1]
    for row in range(values.shape[0]):
        carry, out = carried[row], off[row]
        for j in range(columns):
            scale = scales[row, blocks[j]]
            code = np.float32(0)
            if scale != 0:
                code = np.float32(nearest(min(max((values[row, j] + carry[j]) / scale, low), high)))
            wrong = values[row, j] - code * scale
            out[j] = wrong
            for k in range(j + 1, columns):
                carry[k] += wrong * factor[j, k]


def _codes(values: Floats, inputs: Inputs, scales: Floats, block: int, bits: int) -> Floats:
    """Codes `[rows, in]`, as floats, for given scales."""
    ordered, blocks = np.ascontiguousarray(values[:, inputs.order]), inputs.order // block
    off = np.zeros_like(ordered)
    for start in range(0, values.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        carried = off[:, :start] @ inputs.factor[:start, part]
        wrong = np.empty_like(carried)
        square = np.ascontiguousarray(inputs.factor[part, part])
        _round(np.ascontiguousarray(ordered[:, part]), scales, blocks[part], square, carried, bits, wrong)
        off[:, part] = wrong
    every = scales[:, blocks]
    codes = np.empty_like(ordered)
    codes[:, inputs.order] = np.rint(np.divide(ordered - off, every, out=np.zeros_like(off), where=every != 0))
    return codes


def _refit(values: Floats, gram: Floats, codes: Floats, scales: Floats, block: int) -> Floats:
    """Scales `[rows, in // block]` of least squares in H for given codes; a block that has none keeps its own."""
    rows, blocks = scales.shape
    wanted = ((values @ gram) * codes).reshape(rows, blocks, block).sum(2)
    products = np.empty((rows, blocks, blocks), np.float32)
    for b in range(blocks):
        part = slice(b * block, (b + 1) * block)
        products[:, b] = ((codes[:, part] @ gram[part]) * codes).reshape(rows, blocks, block).sum(2)
    diagonal = np.einsum("rbb->rb", products)
    empty = diagonal == 0
    diagonal += 1e-4 * diagonal.mean(1, keepdims=True) + empty
    found = _held(np.linalg.solve(products, wanted[..., None])[..., 0])
    return np.where(empty | (found == 0) | ~np.isfinite(found), scales, found)
