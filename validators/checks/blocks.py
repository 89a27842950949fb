"""Somebody else's codes of a tensor, block by block, against the best that such a block can do.

Nobody knows which codes another program should have chosen, but what its kind of block could have reached: the error of
our own fit of such a block to the same weights. Two numbers tell a fault in a block from another taste. Its excess is
how many times the least error its error is; programs that move weights on purpose (GPTQ, importances) go far there. Its
gain is how many times its error shrinks if another scale is put to the same codes; no program leaves much of that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.grids.lattice import jit, nearest
from gemexport.formats.tensor import Floats, Grid

Doubles = NDArray[np.float64]

NEIGHBOURS = 256  # weights whose mean least error is added to a block's: K-quants round scales within as many
STARTS = (1.0, 0.9)  # of the scale at which the largest weight meets the outermost level
ROUNDED = 2.0**-9  # of the largest weight: what a scale and a bias in bf16 may each be off by
SHARE = 0.25  # of the error of even rounding, below which nothing counts as least: weights may lie on a lattice


@dataclass(frozen=True)
class Judged:
    """Numbers for each block `[rows, blocks]` of a slice."""

    excess: Doubles  # its error over the least, with the mean least error of its neighbours added to that
    gain: Doubles  # its error over what another scale (and bias) for the same codes leaves of it, the same added
    factor: Doubles  # what that scale is, in those that it has


@jit
def _nearest(x: float, levels: Doubles, middles: Doubles) -> float:
    """The level that is nearest to `x`; of consecutive integers, which have no `middles`, by rounding."""
    if middles.size == 0:
        return float(nearest(min(max(x, levels[0]), levels[-1])))
    low, high = 0, middles.size
    while low < high:
        at = (low + high) // 2
        if middles[at] < x:
            low = at + 1
        else:
            high = at
    return float(levels[low])


@jit
def _levels_error(block: Floats, levels: Doubles, middles: Doubles) -> float:
    """The least error that scale * level reaches, with a scale of either sign."""
    energy, peak = 0.0, 0.0
    for i in range(block.size):
        energy += np.float64(block[i]) * np.float64(block[i])
        if abs(block[i]) > abs(peak):
            peak = np.float64(block[i])
    if peak == 0:
        return 0.0
    best = energy
    for end in (levels[0], levels[-1]):
        for start in STARTS:
            scale = peak / end * start
            for _ in range(2):
                cross, square = 0.0, 0.0
                for i in range(block.size):
                    level = _nearest(block[i] / scale, levels, middles)
                    cross += level * block[i]
                    square += level * level
                if square == 0:
                    break
                best = min(best, energy - cross * cross / square)
                scale = cross / square
                if scale == 0:
                    break
    return max(best, 0.0)


@jit
def _affine_error(block: Floats, most: int) -> float:
    """The least error that scale * code + bias reaches, codes from 0 to `most`."""
    low, high = np.float64(block[0]), np.float64(block[0])
    for i in range(block.size):
        low, high = min(low, np.float64(block[i])), max(high, np.float64(block[i]))
    if low == high:
        return 0.0
    scale, bias, best, n = float(high - low) / most, float(low), np.inf, block.size
    for _ in range(4):
        sw, sc, scc, scw, sww = 0.0, 0.0, 0.0, 0.0, 0.0
        for i in range(n):
            w = np.float64(block[i])
            c = nearest(min(max((w - bias) / scale, 0.0), np.float64(most)))
            sw, sc, scc, scw, sww = sw + w, sc + c, scc + c * c, scw + c * w, sww + w * w
        spread = scc - sc * sc / n
        if spread == 0:
            break
        scale = (scw - sc * sw / n) / spread
        bias = (sw - scale * sc) / n
        best = min(best, sww - sw * sw / n - scale * scale * spread)
        if scale == 0:
            break
    return max(best, 0.0)


@jit
def _blocks(
    values: Floats,
    stored: Floats,
    block: int,
    levels: Doubles,
    middles: Doubles,
    most: int,
    rounded: float,
    out: Doubles,
) -> None:
    """Of each block: error, least error, what another scale leaves of the error, and its factor; `[blocks, 4]`."""
    for b in range(out.shape[0]):
        wanted, found = values[b * block : (b + 1) * block], stored[b * block : (b + 1) * block]
        error, low, high = 0.0, 0.0, 0.0
        sw, ss, sww, sss, sws = 0.0, 0.0, 0.0, 0.0, 0.0
        for i in range(block):
            w, s = np.float64(wanted[i]), np.float64(found[i])
            error += (w - s) * (w - s)
            sw, ss, sww, sss, sws = sw + w, ss + s, sww + w * w, sss + s * s, sws + w * s
            low, high = min(low, w), max(high, w)
        if levels.size > 0:
            least = _levels_error(wanted, levels, middles)
            step = max(high, -low) * 2 / most
        else:
            least = _affine_error(wanted, most)
            step = (high - low) / most
            # A bias is free to move, so means say nothing.
            sww, sss, sws = sww - sw * sw / block, sss - ss * ss / block, sws - sw * ss / block
        off = rounded * max(high, -low)
        out[b, 0], out[b, 1] = error, max(least, SHARE * block * step * step / 12) + 2 * block * off * off / 3
        out[b, 2] = max(sww - sws * sws / sss, 0.0) if sss > 0 else error
        out[b, 3] = sws / sss if sss > 0 else 1.0


def judge(values: Floats, stored: Floats, grid: Grid) -> Judged:
    """Rows of a tensor, `stored` what the artefact's codes mean in them, both `[rows, in]`, the codes on `grid`."""
    rows, width = values.shape
    levels = _levels(grid)
    middles = (levels[1:] + levels[:-1]) / 2 if grid.kind == "codebook" else np.empty(0)
    out = np.empty((rows * width // grid.block, 4))
    ours, theirs = (np.ascontiguousarray(array).reshape(-1) for array in (values, stored))
    rounded = ROUNDED if grid.scale_dtype == "bf16" else 0.0
    _blocks(ours, theirs, grid.block, levels, middles, (1 << grid.bits) - 1, rounded, out)
    error, least, left, factor = (out[:, i].reshape(rows, -1) for i in range(4))
    near, nothing = _near(least, grid.block), np.zeros_like(error)
    excess = np.divide(error, least + near, out=nothing.copy(), where=error > 0)
    gain = np.divide(error, left + near, out=nothing, where=error > 0)
    return Judged(excess, gain, factor)


def _near(numbers: Doubles, block: int) -> Doubles:
    """The mean over blocks that lie together in `NEIGHBOURS` weights of a row, for each block."""
    count = numbers.shape[1]
    together = max(1, min(NEIGHBOURS // block, count))
    edges = np.arange(0, count, together)
    sums = np.add.reduceat(numbers, edges, axis=1)
    sizes = np.diff(np.append(edges, count))
    return np.repeat(sums / sizes, sizes, axis=1)


def _levels(grid: Grid) -> Doubles:
    """What codes stand for, in order; none where a bias or a zero point moves them."""
    if grid.kind == "codebook":
        return np.unique(np.asarray(grid.levels, np.float64))
    if grid.kind == "symmetric":
        return np.arange(-(1 << (grid.bits - 1)), 1 << (grid.bits - 1), dtype=np.float64)
    return np.empty(0)


OCTAVES, STEPS = 40, 64  # of a histogram: from 2**-8 on, and how many steps a factor of two has
FEW = 1000  # one block in so many is passed over where a tensor's own blocks say what is usual
MANY = 4.0  # a gain that no more than a few blocks may have


@dataclass
class Tally:
    """A number of each block of a tensor, counted in steps of a hundredth; the largest, and where it is."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(OCTAVES * STEPS, np.int64))
    most: float = 0.0
    at: tuple[int, int] = (0, 0)  # row, block

    def add(self, numbers: Doubles, first: int) -> bool:
        """Count the numbers `[rows, blocks]` of rows from `first` on; whether the largest so far is among them."""
        finite = np.nan_to_num(numbers, nan=np.inf)
        with np.errstate(divide="ignore"):
            steps = np.clip((np.log2(finite) + 8) * STEPS, 0, self.counts.size - 1)
        self.counts += np.bincount(steps.astype(np.int64).reshape(-1), minlength=self.counts.size)
        if finite.size == 0 or not finite.max() > self.most:
            return False
        row, block = np.unravel_index(int(finite.argmax()), finite.shape)
        self.most, self.at = float(finite.max()), (first + int(row), int(block))
        return True

    def from_top(self, rank: int) -> float:
        """About the number that `rank` others are above of."""
        above = np.cumsum(self.counts[::-1])
        step = self.counts.size - 1 - int(np.searchsorted(above, rank, side="right"))
        return float(2.0 ** ((max(step, 0) + 0.5) / STEPS - 8))

    def above(self, limit: float) -> int:
        """About how many numbers are above a limit."""
        return int(self.counts[int((np.log2(limit) + 8) * STEPS) :].sum())


@dataclass(frozen=True)
class BlockComparison:
    """What was found in the blocks of a tensor; `usual` is what all but one in a thousand stay below."""

    blocks: int
    gain_median: float
    gain_usual: float
    gain: float  # the largest
    many: int  # blocks with a gain of MANY and more
    excess_median: float
    excess_usual: float
    excess: float
    at: tuple[int, int]  # row and column of the block with the largest gain
    factor: float  # what its values should be multiplied by


class Blocks:
    """Adds up what `judge` finds in slices, in their order."""

    def __init__(self, grid: Grid) -> None:
        self._grid, self._rows, self._factor = grid, 0, 1.0
        self._gains, self._excesses = Tally(), Tally()

    def add(self, judged: Judged) -> None:
        """Count the next slice."""
        if self._gains.add(judged.gain, self._rows):
            row, block = self._gains.at
            self._factor = float(judged.factor[row - self._rows, block])
        self._excesses.add(judged.excess, self._rows)
        self._rows += len(judged.gain)

    def comparison(self) -> BlockComparison:
        """What was found in all of them."""
        count = int(self._gains.counts.sum())
        few, row, block = 1 + count // FEW, *self._gains.at
        return BlockComparison(
            blocks=count,
            gain_median=self._gains.from_top(count // 2),
            gain_usual=self._gains.from_top(few),
            gain=self._gains.most,
            many=self._gains.above(MANY),
            excess_median=self._excesses.from_top(count // 2),
            excess_usual=self._excesses.from_top(few),
            excess=self._excesses.most,
            at=(row, block * self._grid.block),
            factor=self._factor,
        )
