"""Finds the integer grid that a tensor's values lie on: the codes and scales that a QAT checkpoint lost on its way.

A QAT release in bf16 holds `w = bf16(s * q)`: q a code from -8 to 7, s one scale for each block of consecutive
weights, of either sign (llama.cpp's own rule gives a block's largest weight the code -8, whatever its sign). Rounding
hides s, but not much: each weight confines its block's scale to the interval that rounds to it, and a block lies on a
grid exactly when, for some code k of its largest weight, those intervals have a number in common. No scale is guessed;
whichever rule made them, the intersection is where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from gemexport.formats.storage.parallel import SLICE, ordered, room
from gemexport.formats.tensor import Codes, DType, Floats, Tensor, matrix_of, slices

BLOCKS = (128, 64, 32, 16)  # tried after one scale a row; the widest that fits is the grid
SEARCHED_BITS = 4  # of the codes that are looked for
SAMPLES, SAMPLED_ROWS = 8, 8  # places in a tensor, and rows at each: a place costs a mapping of the file
_SOURCE: dict[DType, int] = {"bf16": 0, "f16": 1, "f32": 2}

jit = numba.njit(cache=True, nogil=True, error_model="numpy")
# Loops over numbers of which none is NaN, where the order of a maximum does not matter: they may be vectorised.
reduction = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"nnan", "nsz"})


@jit
def nearest(x: float) -> float:
    """`x` rounded to the nearest integer, ties to even, for |x| < 2**51: float64 has no room for a fraction up there.

    As np.rint, but without the call of a library function that keeps loops from being vectorised.
    """
    return (x + 1.5 * 2.0**52) - 1.5 * 2.0**52


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


@reduction
def _peak(magnitudes: NDArray[np.float32]) -> np.float32:
    """The largest |w| of a block."""
    peak = np.float32(0)
    for i in range(magnitudes.size):
        peak = max(peak, magnitudes[i])
    return peak


@jit
def _near(magnitudes: NDArray[np.float32], inverse: np.float32, tolerance: np.float32) -> bool:
    """Whether every |w| * inverse is within `tolerance` of itself from an integer; a wrong k shows in a few weights."""
    half = np.float32(1.5 * 2.0**23)  # as in `nearest`, for float32
    for i in range(magnitudes.size):
        x = magnitudes[i] * inverse
        code = (x + half) - half
        if not abs(x - code) <= code * tolerance:  # so put, it leaves NaN out as well
            return False
    return True


@reduction
def _differs(
    bits: NDArray[np.uint32], magnitudes: NDArray[np.float32], inverse: np.float32, scale: np.float32
) -> np.uint32:
    """Nought when the codes |w| * inverse, on a bf16 `scale`, round to every bf16 weight of the block.

    A code has 4 bits and the scale 8, so float32 holds their product, and rounding it is integer arithmetic.
    """
    half = np.float32(1.5 * 2.0**23)
    wrong = np.uint32(0)
    for i in range(magnitudes.size):
        code = (magnitudes[i] * inverse + half) - half
        product = np.float32(code * scale).view(np.uint32)
        even = (product >> np.uint32(16)) & np.uint32(1)
        rounded = np.uint32(np.uint32(product + np.uint32(0x7FFF)) + even) & np.uint32(0xFFFF0000)
        wrong |= np.uint32(rounded ^ (bits[i] & np.uint32(0x7FFFFFFF)))
    return wrong


@jit
def _bf16_scale(bits: NDArray[np.uint32], magnitudes: NDArray[np.float32], k: int, peak: np.float32) -> float:
    """The bf16 number nearest to peak / k, or one beside it, when it is the scale of the bf16 block; else -1."""
    inverse = np.float32(np.float32(k) / peak)
    guess = np.uint32(np.float32(peak / np.float32(k)).view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)
    for step in (0, -0x10000, 0x10000):
        scale = np.uint32(guess + step).view(np.float32)
        if _differs(bits, magnitudes, inverse, scale) == 0:
            return np.float64(scale)
    return -1.0


@jit
def _prepare(bits: NDArray[np.uint32], row: int, source: int, block: NDArray[np.float64]) -> None:
    """Fill `block` `[3, n]` with |w| of a row, its lower and upper edge.

    A tie rounds to the even pattern, so an odd one does not own its edges: they move in by the least float64, which no
    product of a code and a float32 scale can fall between. A zero has the code 0 on any scale: it excludes nothing.
    """
    step = 0x10000 if source == 0 else (0x2000 if source == 1 else 1)
    for i in range(bits.shape[1]):
        magnitude = bits[row, i] & np.uint32(0x7FFFFFFF)
        below, above = edges(max(magnitude, 0x00800000), source)
        inward = 2.0**-52 * ((magnitude & step) != 0)
        block[0, i] = _float(magnitude)
        block[1, i] = below * (1 + inward) if magnitude else 0.0
        block[2, i] = above * (1 - inward) if magnitude else np.inf


@jit
def _interval(block: NDArray[np.float64], k: int, peak: float) -> tuple[float, float]:
    """Scales that reproduce the block when its largest weight has the code ±k; low > high when there is none.

    The ends are good to a part in 2**52, enough to choose a scale by; `_reproduces` judges it exactly. A wrong k mostly
    shows within a few weights.
    """
    low, high = 0.0, np.inf
    inverse = k / peak
    for i in range(block.shape[1]):
        # A weight that would get the code 0 without being 0 is tried as 1, which contradicts the largest one.
        code = max(nearest(block[0, i] * inverse), 1.0)
        low = max(low, block[1, i] / code)
        high = min(high, block[2, i] / code)
        if low > high:
            return 1.0, 0.0
    return low, high


@jit
def _rounded(x: float, mantissa_bits: int, smallest_exponent: int) -> float:
    """`x` > 0 rounded to a float with so many mantissa bits, ties to even, going subnormal below 2**exponent."""
    exponent = max(int(np.float64(x).view(np.int64) >> 52) - 1023, smallest_exponent)
    quantum = np.int64((exponent - mantissa_bits + 1 + 1023) << 52).view(np.float64)
    return nearest(x / quantum) * quantum


@reduction
def _reproduces(block: NDArray[np.float64], scale: float) -> bool:
    """Whether scale * code, rounded to the source's dtype, is every weight of the block; exact in float64."""
    inverse = 1 / scale
    outside = 0.0
    for i in range(block.shape[1]):
        product = nearest(block[0, i] * inverse) * scale
        outside = max(outside, block[1, i] - product, product - block[2, i])
    return outside <= 0


@jit
def _scale(block: NDArray[np.float64], k: int, peak: float) -> tuple[float, int]:
    """A scale on which the largest weight of a prepared block has the code ±k, in the narrowest dtype that has one.

    Its dtype is told by rank (bf16, f16, f32); the rank 3 means that there is none.
    """
    low, high = _interval(block, k, peak)
    if low > high:
        return -1.0, 3
    middle = (low + high) / 2
    for rank in range(3):
        if rank == 0:
            scale = _rounded(middle, 8, -126)
        elif rank == 1:
            scale = _rounded(middle, 11, -14)
        else:
            scale = _rounded(middle, 24, -126)
        if scale > 0 and (rank != 1 or scale <= 65504.0) and _reproduces(block, scale):
            return scale, rank
    return -1.0, 3


@reduction
def _direction(bits: NDArray[np.uint32], magnitudes: NDArray[np.float32], scale: float) -> float:
    """The sign of `scale` on which all weights that are 8 times as large have the code -8; 0 when there is none."""
    inverse = 1 / scale
    positive, negative = np.uint32(0), np.uint32(0)
    for i in range(magnitudes.size):
        eight = np.uint32(magnitudes[i] * inverse >= 7.5)
        below = bits[i] >> np.uint32(31)
        positive |= np.uint32(eight & (below ^ np.uint32(1)))
        negative |= np.uint32(eight & below)
    if positive and negative:
        return 0.0
    return -1.0 if positive else 1.0


@jit
def _search(blocks: NDArray[np.uint32], source: int, scales: Floats) -> int:
    """Fill `scales` `[n]` for blocks `[n, size]` of float32 patterns; returns the weights on the lattice.

    A block of zeros has the scale 0, one off the lattice NaN. The coarsest grid wins: k ascends.
    """
    on = 0
    block, magnitudes = np.empty((3, blocks.shape[1])), np.empty(blocks.shape[1], np.float32)
    # Half a step of the dtype on the weight's side and on the largest one's, and room for float32's own rounding. Close
    # to the subnormal numbers, where steps are wider than that, every k goes through the sieve.
    tolerance = np.float32(2.0**-6.9 if source == 0 else (2.0**-9.9 if source == 1 else 2.0**-20))
    smallest = 2.0**-13 if source == 1 else 2.0**-100
    for row in range(blocks.shape[0]):
        for i in range(blocks.shape[1]):
            magnitudes[i] = np.uint32(blocks[row, i] & np.uint32(0x7FFFFFFF)).view(np.float32)
        peak = _peak(magnitudes)
        found, rank, prepared = (0.0 if peak == 0 else np.nan), 3, False
        for k in range(1, 9 if peak > 0 else 0):
            scale, other = -1.0, 3
            if peak > smallest:
                if not _near(magnitudes, np.float32(k) / peak, tolerance):
                    continue
                # What QAT releases are, first: the rest finds every other scale, but takes four times as long.
                if source == 0:
                    scale = _bf16_scale(blocks[row], magnitudes, k, peak)
            if scale > 0:
                other = 0
            else:
                if not prepared:
                    _prepare(blocks, row, source, block)
                    prepared = True
                scale, other = _scale(block, k, np.float64(peak))
            if k == 8 and other < rank:
                scale *= _direction(blocks[row], magnitudes, scale)
            if other < rank and scale != 0:
                found, rank = scale, other
            if rank == 0:
                break
        scales[row] = found
        if not np.isnan(found):
            on += blocks.shape[1]
    return on


def search(values: Floats, block: int, dtype: DType) -> tuple[Floats, int]:
    """Scales `[rows, in // block]` of values `[rows, in]`, NaN for a block off the lattice, and the weights on it.

    `dtype` is the source's, to which the products were rounded; a block of zeros has the scale 0.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    scales = np.empty((values.shape[0], values.shape[1] // block), dtype=np.float32)
    return scales, int(_search(values.view(np.uint32).reshape(-1, block), _SOURCE[dtype], scales.reshape(-1)))


@jit
def _encode(values: Floats, scales: Floats, low: float, high: float, codes: Codes) -> None:
    block = values.size // scales.size
    for b in range(scales.size):
        inverse = 0.0 if scales[b] == 0 else 1.0 / scales[b]
        # Blocks by themselves, and integers as wide as a float, are what lets the loop be vectorised.
        given, found = values[b * block : (b + 1) * block], codes[b * block : (b + 1) * block]
        for i in range(block):
            found[i] = np.int8(np.int32(nearest(min(max(given[i] * inverse, low), high))))


def encode(values: Floats, scales: Floats, bits: int) -> Codes:
    """Nearest codes `[rows, in]` of `values` on the grid of `scales` `[rows, in // block]`; 0 where the scale is 0."""
    codes = np.empty(values.shape, dtype=np.int8)
    if scales.size:
        given, factors = np.ascontiguousarray(values).reshape(-1), np.ascontiguousarray(scales).reshape(-1)
        _encode(given, factors, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1, codes.reshape(-1))
    return codes


@reduction
def _fits(values: Floats, scales: Floats, low: float, high: float) -> bool:
    """Whether every code lies in [low, high], as those of the blocks' lowest and highest values do."""
    block = values.shape[1] // scales.shape[1]
    for row in range(values.shape[0]):
        for b in range(scales.shape[1]):
            lowest = highest = values[row, b * block]
            for i in range(b * block, (b + 1) * block):
                lowest, highest = min(lowest, values[row, i]), max(highest, values[row, i])
            inverse = 0.0 if scales[row, b] == 0 else 1.0 / scales[row, b]
            for extreme in (lowest * inverse, highest * inverse):
                if not low <= nearest(extreme) <= high:
                    return False
    return True


def code_bits(values: Floats, scales: Floats, most: int = 8) -> int:
    """2, 4 or 8: the narrowest signed width that holds every code of values `[rows, in]` on a grid that they lie on.

    `most` bits are known to be enough. A width that is too narrow shows within a few blocks.
    """
    widths = [bits for bits in (2, 4) if bits < most]
    fitting = (bits for bits in widths if _fits(values, scales, -(1 << (bits - 1)), (1 << (bits - 1)) - 1))
    return next(fitting, most)


def candidate_blocks(width: int) -> list[int]:
    """Block sizes to try for rows of `width` weights, the widest first: one scale a row, then the fixed sizes."""
    return [width] + [block for block in BLOCKS if width % block == 0 and block < width]


def likely_block(tensor: Tensor) -> int | None:
    """The widest block for which a sample of rows lies on the lattice; None when there is none."""
    sample = sampled(tensor)
    for block in candidate_blocks(tensor.shape[-1]):
        _, on = search(sample, block, tensor.dtype)
        if on == sample.size:
            return block
    return None


def sampled(tensor: Tensor) -> Floats:
    """Some rows `[n, in]` from all over a tensor; the first is its first."""
    out = matrix_of(tensor.shape)[0]
    starts = np.unique(np.linspace(0, max(0, out - SAMPLED_ROWS), SAMPLES).astype(int)).tolist()
    return np.concatenate([tensor.rows(start, min(start + SAMPLED_ROWS, out)).values for start in starts])


def load() -> None:
    """Have the compiled loops in memory: the first call of one takes Numba a quarter of a second."""
    values, scales = np.zeros((1, 32), np.float32), np.zeros((1, 1), np.float32)
    search(values, 32, "bf16")
    encode(values, scales, 4)
    code_bits(values, scales)


@dataclass(frozen=True)
class Found:
    """What the search found in a slice of rows."""

    tensor: Tensor
    block: int
    scales: Floats  # [rows, in // block]
    weights: int
    on: int  # weights on the lattice
    bits: int  # that their codes need; 0 when not all are on the lattice
    fault: str  # of a weight that is no number


def search_all(tensors: Sequence[Tensor], threads: int | None = None) -> Iterator[Found]:
    """Search tensors on the block that each likely has, slice by slice, in order, side by side.

    A tensor whose sample fits no block still deserves a number: it is searched on the usual one.
    """
    width = max((tensor.shape[-1] for tensor in tensors), default=1)
    blocks = ordered(likely_block, tensors, room(SAMPLES * SAMPLED_ROWS * 4 * width, threads))
    jobs = (
        (tensor, block or next((b for b in (32, 16) if tensor.shape[-1] % b == 0), tensor.shape[-1]), bounds)
        for tensor, block in zip(tensors, blocks, strict=True)
        for bounds in slices(tensor, SLICE)
    )
    yield from ordered(lambda job: _examine(*job), jobs, room(max(SLICE, 4 * width), threads))


def _examine(tensor: Tensor, block: int, bounds: tuple[int, int]) -> Found:
    values = tensor.rows(*bounds).values
    scales, on = search(values, block, tensor.dtype)
    whole = on == values.size
    bits = code_bits(values, scales, SEARCHED_BITS) if whole else 0
    return Found(tensor, block, scales, values.size, on, bits, "" if whole else fault(values))


def fault(values: Floats) -> str:
    """`NaN` or `infinite` when one of the values is; else nothing."""
    if np.isfinite(values).all():
        return ""
    return "NaN" if np.isnan(values).any() else "infinite"
