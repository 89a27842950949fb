"""Whether an artefact has what was promised, to the bit (`formats/promise.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemexport.formats.grids.lattice import jit
from gemexport.formats.promise import Anew, Promise
from gemexport.formats.tensor import Grid, Rows, Tensor
from gemexport.validators.checks.evaluated import PIECE, Numbers, evaluate, numbers_of


@dataclass(frozen=True)
class Held:
    """What a slice has of what was promised."""

    weights: int
    kept: int
    first: int  # place of the first that was not kept, or -1
    coded: int  # weights of blocks whose codes are all as promised, of those that have codes


class Kept:
    """What a tensor has of what was promised, added up over slices in their order."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.weights, self.kept = 0, 0
        self.broken_at: tuple[int, int] | None = None
        self._coded, self._width = 0, max(shape[-1] if shape else 1, 1)

    def add(self, held: Held | None) -> None:
        """Count the next slice."""
        if held is None:
            return
        if held.first >= 0 and self.broken_at is None:
            row, column = divmod(self.weights + held.first, self._width)
            self.broken_at = row, column
        self.weights, self.kept = self.weights + held.weights, self.kept + held.kept
        self._coded += held.coded

    def recognised(self, promise: Promise, stored: Tensor) -> bool:
        """Whether a tensor of an artefact of unknown origin was made as promised: its codes are, by half at least.

        Of a lattice, whose codes whoever looks for them finds, it is the scales too, and the artefact does not say that
        they were fitted anew; codes that a variant makes of the values are those of other programs as well, and plain
        values are anybody's.
        """
        grid = promise.tensor.grid
        if grid is None or stored.grid is None or isinstance(promise.tensor, Anew):
            return self.kept == self.weights
        if grid.lossless:
            return not stored.requantized and 2 * self.kept >= self.weights
        return 2 * max(self.kept, self._coded) >= self.weights


def held_of(promise: Promise, stored: Tensor, own: Rows, found: Rows, ours: bool) -> Held:
    """What a slice, `own` as it was promised, has kept of that."""
    grid, wanted = promise.rounded(own, grid=stored.grid is not None)
    numbers, theirs = numbers_of(grid, wanted), numbers_of(stored.grid, found)
    # The same codes on the same scales need not be multiplied.
    if all(np.array_equal(a, b) for a, b in zip(numbers, theirs, strict=True)):
        kept, first = numbers[0].size, -1
    else:
        kept, first = _keep(numbers, theirs)
    coded = 0 if first < 0 or ours or grid is None else _coded(wanted, found, grid)
    return Held(numbers[0].size, kept, first, coded)


def _coded(wanted: Rows, found: Rows, grid: Grid) -> int:
    """Weights of blocks whose codes are all those that were wanted; blocks of nothing but zero say nothing."""
    if found.codes is None or wanted.codes is None or found.codes.shape != wanted.codes.shape:
        return 0
    blocks = wanted.codes.reshape(-1, grid.block)
    same = (blocks == found.codes.reshape(-1, grid.block)).all(axis=1) & blocks.any(axis=1)
    return int(np.count_nonzero(same)) * grid.block


@jit
def _keep(wanted: Numbers, found: Numbers) -> tuple[int, int]:
    """How many of the numbers found are those that were wanted, and the place of the first that is not, or -1."""
    kept, first = 0, -1
    ours, theirs = np.empty(PIECE, np.float64), np.empty(PIECE, np.float64)
    for start in range(0, wanted[0].size, PIECE):
        size = min(PIECE, wanted[0].size - start)
        evaluate(wanted[0], wanted[1], wanted[2], wanted[3], start, ours[:size])
        evaluate(found[0], found[1], found[2], found[3], start, theirs[:size])
        same = 0
        for i in range(size):
            same += ours[i] == theirs[i]
        kept += same
        if same < size and first < 0:
            for i in range(size):
                if ours[i] != theirs[i]:
                    first = start + i
                    break
    return kept, first
