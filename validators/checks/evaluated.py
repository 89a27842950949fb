"""Stored numbers, evaluated without rounding: in float64, which holds every product of a code and a float32 scale."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.grids.lattice import jit
from gemexport.formats.tensor import Codes, Floats, Grid, Rows

Numbers = tuple[NDArray[Any], Floats, Floats, Floats]  # codes, scales, zero points and biases, all flat
PIECE = 512  # weights that are evaluated and judged in one go
_NONE: Floats = np.empty(0, np.float32)


@jit
def evaluate(
    codes: Codes | Floats, scales: Floats, zeros: Floats, biases: Floats, start: int, found: NDArray[np.float64]
) -> None:
    """Fill `found` with what the codes from `start` on mean: (code - zero) * scale + bias, each by itself exact."""
    block = codes.size // scales.size
    first, zero, bias = 0, 0.0, 0.0
    while first < found.size:
        b = (start + first) // block
        last = min((b + 1) * block - start, found.size)
        if zeros.size > 0:
            zero = np.float64(zeros[b])
        if biases.size > 0:
            bias = np.float64(biases[b])
        scale = np.float64(scales[b])
        given, out = codes[start + first : start + last], found[first:last]
        for i in range(out.size):
            out[i] = (np.float64(given[i]) - zero) * scale + bias
        first = last


def numbers_of(grid: Grid | None, rows: Rows) -> Numbers:
    """Rows as `evaluate` takes them, each array empty where there are none.

    What has no grid is its own code on a scale of one, and so are sums of vectors, which are no product of two numbers.
    """
    if grid is None or grid.kind == "vectors" or rows.codes is None:
        return _flat(rows.values), np.ones(1, np.float32), _NONE, _NONE
    codes, scales = (_flat(array) for array in rows.grid())
    if grid.kind == "codebook":
        return np.asarray(grid.levels)[codes], scales, _NONE, _NONE
    if rows.shifts is None:
        return codes, scales, _NONE, _NONE
    shifts = _flat(rows.shifts)
    return (codes, scales, shifts, _NONE) if grid.kind == "zero-point" else (codes, scales, _NONE, shifts)


def _flat(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array).reshape(-1)
