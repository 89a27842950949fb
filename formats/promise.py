"""What an artefact has to hold of a tensor, to the bit: what its exporter was given, rounded as the format prescribes.

An exporter says it of a checkpoint and a variant (`exporters/fitting.py`), and a validator holds what it reads back
against it. Nothing of it comes from the artefact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gemexport.formats.tensor import DType, Floats, Grid, Rows, Tensor, TensorBase, round_to


@dataclass(frozen=True)
class Promise:
    """The numbers that a tensor of an artefact stands for, whatever bytes they are in.

    Of a tensor on a grid they are its codes with its scales and biases, rounded to `scales` and to nothing narrower.
    The source's own values, rounded to `plain` and to nothing narrower, are as good.
    """

    tensor: Tensor  # on the grid that the artefact keeps, or on none
    scales: DType = "f32"
    plain: DType = "f32"
    biased: bool = False  # zero points are stored as biases, -zero * scale, rounded like scales

    def rounded(self, rows: Rows, *, grid: bool) -> tuple[Grid | None, Rows]:
        """Rows of the tensor as they are to be stored, and their grid; without `grid` the values that are as good."""
        own = self.tensor.grid
        if not grid or own is None:
            return None, Rows(round_to(rows.values, self.plain))
        if self.scales == "f32" and not (self.biased and own.kind == "zero-point"):
            return own, rows
        return self._rounded(own, rows)

    def _rounded(self, own: Grid, rows: Rows) -> tuple[Grid, Rows]:
        codes, scales = rows.grid()
        narrow = round_to(scales, self.scales)
        if own.kind == "symmetric" or own.kind == "codebook" or rows.shifts is None:
            return own, Rows(lambda: rows.values, codes, narrow)
        if own.kind == "affine":
            return own, Rows(lambda: rows.values, codes, narrow, round_to(rows.shifts, self.scales))
        if not self.biased:
            return own, Rows(lambda: rows.values, codes, narrow, rows.shifts)
        affine = Grid(own.bits, own.block, own.scale_dtype, own.lossless, "affine")
        return affine, Rows(lambda: rows.values, codes, narrow, round_to(-rows.shifts * scales, self.scales))


class Anew(TensorBase):
    """A tensor whose codes or values a format makes of another one's values, rows by rows: what a variant asks for."""

    def __init__(self, base: Tensor, grid: Grid | None, make: Callable[[Floats], Rows]) -> None:
        self.name, self.shape, self.dtype, self.grid = base.name, base.shape, base.dtype, grid
        self._base, self._make = base, make

    def rows(self, start: int, stop: int) -> Rows:
        return self._make(self._base.rows(start, stop).values)


def shifted_back(tensor: Tensor, there_and_back: Callable[[Floats], Floats]) -> Anew:
    """A vector as it reads back after a format has added and multiplied what its programs expect."""
    return Anew(tensor, None, lambda values: Rows(there_and_back(values)))
