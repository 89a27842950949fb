"""A tensor whose rows are those of others: for formats that keep a stack of matrices apart, or in another order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from gemexport.formats.tensor import DType, Floats, Grid, Rows, Tensor, TensorBase, row_count


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a tensor."""

    tensor: Tensor
    start: int
    stop: int


def whole(tensor: Tensor) -> Piece:
    """All rows of a tensor."""
    return Piece(tensor, 0, row_count(tensor.shape))


class Pieces(TensorBase):
    """The rows of `pieces`, one after the other, as the tensor `name` of a shape with as many rows of that width.

    It is on a grid where all pieces are on the same one; scales may need different dtypes.
    """

    def __init__(self, name: str, shape: tuple[int, ...], pieces: Iterable[Piece]) -> None:
        self.name, self.shape, self.pieces = name, shape, tuple(pieces)
        self._ends = list(accumulate(piece.stop - piece.start for piece in self.pieces))
        dtypes = {piece.tensor.dtype for piece in self.pieces}
        self.dtype: DType = dtypes.pop() if len(dtypes) == 1 else "f32"
        widths = {piece.tensor.shape[-1] for piece in self.pieces}
        if widths != {shape[-1]} or self._ends[-1] != row_count(shape):
            raise ValueError(f"{name}: {self._ends[-1]} rows of {widths} do not make {shape}")
        self.requantized = any(piece.tensor.requantized for piece in self.pieces)

    @property
    def width(self) -> int | None:
        """The width that the pieces have in common; None where they differ."""
        found = {piece.tensor.width for piece in self.pieces}
        return found.pop() if len(found) == 1 else None

    @cached_property
    def grid(self) -> Grid | None:
        """The grid that the pieces have in common; None where they have none."""
        grids = {piece.tensor.grid for piece in self.pieces}
        first = next(iter(grids))
        if len(grids) == 1 or first is None or None in grids:
            return first if len(grids) == 1 else None
        found = [grid for grid in grids if grid is not None]
        dtypes = {grid.scale_dtype for grid in found}
        dtype: DType = dtypes.pop() if len(dtypes) == 1 else "f32"
        common = replace(first, scale_dtype=dtype, lossless=all(grid.lossless for grid in found))
        alike = {replace(grid, scale_dtype=dtype, lossless=common.lossless) for grid in found}
        return common if alike == {common} else None

    def rows(self, start: int, stop: int) -> Rows:
        parts = [piece.tensor.rows(first, last) for piece, first, last in self._within(start, stop)]
        if len(parts) == 1:
            return parts[0] if self.grid is not None else Rows(parts[0].values)

        def values() -> Floats:
            return np.concatenate([part.values for part in parts])

        if self.grid is None:
            return Rows(values)
        scales, shifts = _joined([part.scales for part in parts]), _joined([part.shifts for part in parts])
        return Rows(values, lambda: np.concatenate([part.grid()[0] for part in parts]), scales, shifts)

    def _within(self, start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
        """The pieces that rows `start` to `stop` lie in, and which rows of each one's tensor they are."""
        index = bisect_right(self._ends, start)
        while start < stop:
            piece, end = self.pieces[index], min(stop, self._ends[index])
            offset = piece.stop - self._ends[index]
            yield piece, start + offset, end + offset
            start, index = end, index + 1


def _joined(arrays: list[Floats | None]) -> Floats | None:
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if there else None
