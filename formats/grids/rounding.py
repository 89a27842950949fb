"""Round-to-nearest on a scale of least squares: the codes of a tensor that lies on no lattice.

Every format gets the same codes from here, so artefacts of one plain checkpoint agree with each other. Scales are f16
numbers, which every format can hold.
"""

from __future__ import annotations

import numpy as np

from gemexport.formats.grids.lattice import jit, nearest
from gemexport.formats.tensor import Floats


@jit
def _to_f16(x: float) -> float:
    """`x` rounded to float16's precision, ties to even, going subnormal below 2**-14; as float64."""
    if x == 0:
        return 0.0
    exponent = max(int(np.floor(np.log2(abs(x)))), -14)
    quantum = 2.0 ** (exponent - 10)
    return nearest(x / quantum) * quantum


@jit
def _project(block: Floats, scale: float, low: int, high: int) -> tuple[float, float]:
    """For the codes nearest to block / scale: their least-squares scale, and the energy that it explains."""
    inverse = 1.0 / scale
    cross, square = 0.0, 0.0
    for i in range(block.size):
        code = nearest(min(max(block[i] * inverse, low), high))
        cross += code * block[i]
        square += code * code
    return (cross / square, cross * cross / square) if square > 0 else (scale, 0.0)


@jit
def _best_scale(block: Floats, bits: int) -> float:
    """The best of a few starting scales, each improved once by least squares.

    The starts put the block's largest weight between the largest code and just past the lowest one; a negative scale
    lets a block whose largest weight is positive use the one code more that the negative side has.
    """
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    peak = 0.0
    for i in range(block.size):
        if abs(block[i]) > abs(peak):
            peak = block[i]
    if peak == 0:
        return 0.0
    best, explained = 0.0, -1.0
    for start in (float(low), low - 0.5, low + 0.5, float(high), high - 0.5, high + 0.5):
        scale, _ = _project(block, peak / start, low, high)
        rounded = _to_f16(scale)
        if rounded == 0:
            continue
        _, energy = _project(block, rounded, low, high)
        if energy > explained:
            best, explained = rounded, energy
    return best


@jit
def _fit(values: Floats, block: int, bits: int, scales: Floats) -> None:
    for row in range(scales.shape[0]):
        for b in range(scales.shape[1]):
            scales[row, b] = _best_scale(values[row, b * block : (b + 1) * block], bits)


def fit(values: Floats, block: int, bits: int) -> Floats:
    """Scales `[rows, in // block]` for round-to-nearest codes of `bits` bits of values `[rows, in]`."""
    scales = np.empty((values.shape[0], values.shape[1] // block), dtype=np.float32)
    _fit(np.ascontiguousarray(values, dtype=np.float32), block, bits, scales)
    return scales
