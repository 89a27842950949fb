"""Finds the integer grid that a tensor's values lie on: the codes and scales that a QAT checkpoint lost on its way.

A QAT release in bf16 holds `w = bf16(s * q)`: q a signed 4-bit code, s one scale for each block of consecutive
weights. Rounding hides s, but not much: each weight confines its block's scale to the interval that rounds to it, and
a block lies on a grid exactly when, for some code k of its largest weight, those intervals have a number in common.
No scale is guessed; whichever rule made them, the intersection is where they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
from numpy.typing import NDArray

from gemexport.formats.parallel import ordered
from gemexport.formats.tensor import Codes, DType, Floats, Tensor, slices

BLOCKS = (128, 64, 32, 16)  # tried after one scale a row; the widest that fits is the grid
BITS = 4
SAMPLED_ROWS = 64
_RECIPROCAL = np.array([np.inf] + [1 / code for code in range(1, 9)])  # a multiplication costs a tenth of a division
_SOURCE: dict[DType, int] = {"bf16": 0, "f16": 1, "f32": 2}

jit = numba.njit(cache=True, nogil=True, error_model="numpy")


@jit
def _float(pattern: int) -> float:
    """The float32 with this bit pattern; integer arithmetic in Numba widens to 64 bits, hence the cast."""
    return np.float64(np.uint32(pattern).view(np.float32))


@jit
def edges(bits: int, source: int) -> tuple[float, float]:
    """Lowest and highest real number that rounds to the positive float32 `bits` in the source's dtype.

    Floats of one sign are ordered as their bit patterns, so the midpoints to a value's neighbours lie half a step of
    the pattern away, also at a power of two, where the step below is half as wide.
    """
    value = _float(bits)
    if source == 0:  # bf16: a step is 2**16 patterns of float32
        return _float(bits - 0x8000), _float(bits + 0x8000)
    if source == 1:  # f16: 2**13, until it goes subnormal
        if value < 2.0**-14:
            return value - 2.0**-25, value + 2.0**-25
        return _float(bits - 0x1000), _float(bits + 0x1000)
    return (_float(bits - 1) + value) / 2, (value + _float(bits + 1)) / 2


@jit
def _interval(bits: NDArray[np.uint32], k: int, peak: float, source: int) -> tuple[float, float]:
    """Scales that reproduce a block when its largest weight has the code ±k; low > high when there is none.

    The ends are good to a part in 2**52, enough to choose a scale by; `_reproduces` judges it exactly.
    """
    low, high = 0.0, np.inf
    inverse = k / peak
    for i in range(bits.size):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        if magnitude == 0:
            continue
        code = int(np.rint(_float(magnitude) * inverse))
        if code == 0 or (code == 8 and bits[i] == magnitude):  # +8 is not a 4-bit code
            return 1.0, 0.0
        below, above = edges(magnitude, source)
        low = max(low, below * _RECIPROCAL[code])
        high = min(high, above * _RECIPROCAL[code])
        if low > high:
            return 1.0, 0.0
    return low, high


@jit
def _rounded(x: float, mantissa_bits: int, smallest_exponent: int) -> float:
    """`x` > 0 rounded to a float with so many mantissa bits, ties to even, going subnormal below 2**exponent."""
    exponent = max(int(np.floor(np.log2(x))), smallest_exponent)
    quantum = 2.0 ** (exponent - mantissa_bits + 1)
    return np.rint(x / quantum) * quantum


@jit
def _reproduces(bits: NDArray[np.uint32], scale: float, source: int) -> bool:
    """Whether scale * code, rounded to the source's dtype, is every weight of the block; exact arithmetic in float64."""
    inverse = 1 / scale
    for i in range(bits.size):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        if magnitude == 0:
            continue
        product = np.rint(_float(magnitude) * inverse) * scale
        below, above = edges(magnitude, source)
        # Ties round to the even pattern, so an odd one does not own its edges.
        step = 0x10000 if source == 0 else (0x2000 if source == 1 else 1)
        odd = (magnitude & step) != 0
        if product < below or product > above or (odd and product in (below, above)):
            return False
    return True


@jit
def _block_scale(bits: NDArray[np.uint32], source: int) -> float:
    """The scale of one block in the narrowest dtype that has one (bf16, f16, f32); 0 for zeros, -1 off the lattice.

    The coarsest grid wins: k ascends, and a wrong k fails within a few weights.
    """
    top = 0
    for i in range(bits.size):
        top = max(top, bits[i] & np.uint32(0x7FFFFFFF))
    if top == 0:
        return 0.0
    peak = _float(top)
    found, found_rank = -1.0, 3
    for k in range(1, 9):
        low, high = _interval(bits, k, peak, source)
        if low > high:
            continue
        middle = (low + high) / 2
        for rank in range(found_rank):
            if rank == 0:
                scale = _rounded(middle, 8, -126)
            elif rank == 1:
                scale = _rounded(middle, 11, -14)
            else:
                scale = _rounded(middle, 24, -126)
            if scale > 0 and (rank != 1 or scale <= 65504.0) and _reproduces(bits, scale, source):
                found, found_rank = scale, rank
                break
        if found_rank == 0:
            break
    return found


@jit
def _search(bits: NDArray[np.uint32], block: int, source: int, scales: Floats) -> int:
    """Fill `scales` `[rows, in // block]` (-1 off the lattice); returns how many weights lie on it."""
    on = 0
    for row in range(bits.shape[0]):
        for b in range(scales.shape[1]):
            scale = _block_scale(bits[row, b * block : (b + 1) * block], source)
            scales[row, b] = scale
            if scale >= 0:
                on += block
    return on


def search(values: Floats, block: int, dtype: DType) -> tuple[Floats, int]:
    """Scales `[rows, in // block]` of values `[rows, in]`, -1 for a block off the lattice, and the weights on it.

    `dtype` is the source's, to which the products were rounded; a block of zeros has the scale 0.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    scales = np.empty((values.shape[0], values.shape[1] // block), dtype=np.float32)
    return scales, int(_search(values.view(np.uint32), block, _SOURCE[dtype], scales))


@jit
def _encode(values: Floats, scales: Floats, low: int, high: int, codes: Codes) -> None:
    block = values.shape[1] // scales.shape[1]
    for row in range(values.shape[0]):
        for b in range(scales.shape[1]):
            scale = scales[row, b]
            inverse = np.float32(0) if scale == 0 else np.float32(1) / scale
            for i in range(b * block, (b + 1) * block):
                codes[row, i] = np.int8(min(max(np.rint(values[row, i] * inverse), low), high))


def encode(values: Floats, scales: Floats, bits: int) -> Codes:
    """Nearest codes `[rows, in]` of `values` on the grid of `scales` `[rows, in // block]`; 0 where the scale is 0."""
    codes = np.empty(values.shape, dtype=np.int8)
    _encode(values, np.ascontiguousarray(scales), -(1 << (bits - 1)), (1 << (bits - 1)) - 1, codes)
    return codes


def code_bits(codes: Codes) -> int:
    """2, 4 or 8: the narrowest signed width that holds every code."""
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    return next(bits for bits in (2, 4, 8) if low >= -(1 << (bits - 1)) and high < 1 << (bits - 1))


def candidate_blocks(width: int) -> list[int]:
    """Block sizes to try for rows of `width` weights, the widest first: one scale a row, then the fixed sizes."""
    return [width] + [block for block in BLOCKS if width % block == 0 and block < width]


def likely_block(tensor: Tensor) -> int | None:
    """The widest block for which a sample of rows lies on the lattice; None when there is none."""
    out, width = tensor.shape
    rows = np.unique(np.linspace(0, out - 1, SAMPLED_ROWS).astype(int))
    sample = np.concatenate([tensor.rows(int(row), int(row) + 1).values for row in rows])
    for block in candidate_blocks(width):
        _, on = search(sample, block, tensor.dtype)
        if on == sample.size:
            return block
    return None


def search_slices(tensor: Tensor, block: int, threads: int | None = None) -> Iterator[tuple[Floats, Floats, int]]:
    """Yield `(values, scales, weights on the lattice)` for each slice of rows, in order, searched side by side."""

    def one(bounds: tuple[int, int]) -> tuple[Floats, Floats, int]:
        values = tensor.rows(*bounds).values
        return values, *search(values, block, tensor.dtype)

    yield from ordered(one, slices(tensor, 8 << 20), threads)
