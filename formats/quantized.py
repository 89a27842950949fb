"""Matrices whose files keep codes: a layout says where codes, scales and shifts lie, and this makes a tensor of them.

Every layout hands out unsigned codes. Which of the four grids they lie on (formats/tensor) follows from the numbers:
zero points that are all in the middle make a symmetric grid, biases that are whole multiples of their scales make zero
points. So the same weights have the same grid whatever the format they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.storage.bitpack import Unsigned, signed, zero_code
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import FLOAT_DTYPES, MappedArray
from gemexport.formats.tensor import (
    DType,
    Floats,
    Grid,
    Kind,
    Rows,
    Tensor,
    TensorBase,
    expand,
    from_bf16,
    holding,
    on_grid,
    round_to,
    slices,
)

SCALE_SLICE = 1 << 20  # scales looked at in one go


@dataclass(frozen=True)
class Layout:
    """Where a tensor `[…, in]` keeps its numbers. Each function reads rows `start` to `stop` now.

    Codes are unsigned. Shifts are zero points (kind "zero-point") or biases ("affine"), and there are none with a
    codebook; without `shifts`, every zero point is 2**(bits - 1).
    """

    bits: int
    block: int
    codes: Callable[[int, int], Unsigned]  # [rows, in]
    scales: Callable[[int, int], Floats]  # [rows, in // block]
    shifts: Callable[[int, int], Floats] | None = None  # [rows, in // block]
    kind: Kind = "zero-point"
    levels: tuple[float, ...] = ()  # of a codebook
    evaluated_in: DType | None = None  # what the format's runtime rounds to at each step; None: it loses nothing


class QuantizedTensor(TensorBase):
    """A tensor `[…, in]` read from codes, under its canonical name; its values are what they mean, in float32."""

    dtype: DType = "f32"

    def __init__(self, name: str, shape: tuple[int, ...], layout: Layout) -> None:
        self.name, self.shape = name, shape
        self._layout = layout

    @property
    def packing(self) -> tuple[int, int]:
        """Bits of a stored code, and how many columns share a scale."""
        return self._layout.bits, self._layout.block

    @property
    def width(self) -> int:
        """The bits of a stored code; what kind of grid the scales and shifts make is not asked."""
        return self._layout.bits

    @cached_property
    def grid(self) -> Grid:
        """The grid that the stored numbers make; reads every scale once."""
        layout = self._layout
        left: tuple[DType, ...] = ("bf16", "f16")
        biases_left = left
        symmetric = whole = layout.kind != "codebook"
        for scales, shifts in self._scales_and_shifts():
            left = holding(scales, left)
            if shifts is None:
                continue
            if layout.kind == "affine":
                biases_left = holding(shifts, biases_left)
                zeros = _zero_points(scales, shifts, layout.bits) if whole else None
                whole = zeros is not None
            else:
                zeros = shifts
            symmetric = symmetric and zeros is not None and _in_the_middle(zeros, scales, layout.bits)
        kind = layout.kind
        if kind != "codebook":
            kind = "symmetric" if symmetric else "zero-point" if whole else "affine"
        if kind == "affine":
            left = tuple(dtype for dtype in left if dtype in biases_left)
        return Grid(layout.bits, layout.block, next(iter(left), "f32"), lossless=True, kind=kind, levels=layout.levels)

    def rows(self, start: int, stop: int) -> Rows:
        """Rows with their codes, scales and shifts, and the float32 values nearest to what these mean."""
        layout, grid = self._layout, self.grid
        codes, scales = layout.codes(start, stop), layout.scales(start, stop)
        if grid.kind == "symmetric":
            return on_grid(grid, signed(codes, grid.bits), scales)
        if grid.kind == "codebook":
            return on_grid(grid, codes, scales)
        assert layout.shifts is not None
        shifts = layout.shifts(start, stop)
        if grid.kind == "zero-point" and layout.kind == "affine":
            found = _zero_points(scales, shifts, grid.bits)
            assert found is not None
            shifts = found
        return on_grid(grid, codes, scales, shifts)

    def as_it_runs(self, start: int, stop: int) -> Floats | None:
        """What comes of rounding at each step to the dtype that the format's runtime evaluates in, if it does."""
        layout = self._layout
        if layout.evaluated_in is None or layout.shifts is None:
            return None
        scales, shifts = (expand(part(start, stop), layout.block) for part in (layout.scales, layout.shifts))
        return round_to(round_to(layout.codes(start, stop) * scales, layout.evaluated_in) + shifts, layout.evaluated_in)

    def _scales_and_shifts(self) -> Iterator[tuple[Floats, Floats | None]]:
        for start, stop in slices(self, 4 * SCALE_SLICE * self._layout.block):
            shifts = None if self._layout.shifts is None else self._layout.shifts(start, stop)
            yield self._layout.scales(start, stop), shifts


def _zero_points(scales: Floats, biases: Floats, bits: int) -> Floats | None:
    """The zero points that biases amount to, bias = -zero * scale; None when they are not whole, or no codes."""
    wanted = -biases.astype(np.float64)
    with np.errstate(all="ignore"):
        # Where the scale is zero any zero point will do, if only the bias is zero as well.
        zeros = np.where(scales == 0, float(zero_code(bits)), np.rint(wanted / scales))
        whole = (zeros * scales == wanted) & (zeros >= 0) & (zeros < 1 << bits)
    return zeros.astype(np.float32) if whole.all() else None


def _in_the_middle(zeros: Floats, scales: Floats, bits: int) -> bool:
    return bool(((zeros == zero_code(bits)) | (scales == 0)).all())


def floats(stored: MappedArray, start: int, stop: int) -> Floats:
    """Rows of an array of floats, or elements of a vector, as float32."""
    array = (stored.matrix if len(stored.entry.shape) > 1 else stored.array)[start:stop]
    return from_bf16(array) if stored.entry.dtype == "BF16" else np.asarray(array, dtype=np.float32)


def is_float(stored: MappedArray | None) -> bool:
    """Whether there is such an array, and it holds floats that need no decoding."""
    return stored is not None and stored.entry.dtype in FLOAT_DTYPES


def runs(group_of: NDArray[np.integer], groups: int) -> tuple[int, NDArray[np.intp]] | None:
    """The widest block of consecutive columns that share a group, and the group of each such block.

    `group_of` is the group of each column (GPTQ's g_idx). None when a column names a group that there is not.
    """
    if group_of.min() < 0 or group_of.max() >= groups:
        return None
    starts = np.flatnonzero(np.diff(group_of)) + 1
    block = int(np.gcd.reduce([len(group_of), *starts.tolist()]))
    return block, group_of[::block].astype(np.intp)


def misshapen(name: str, found: MappedArray, shape: tuple[int, ...]) -> InputError:
    """An array whose shape is not that of any packing of a matrix of `shape`."""
    problem = f"tensor {name} is stored as {list(found.entry.shape)}, which does not make {list(shape)}"
    return InputError(found.path, problem, "use the config.json that came with the model")


def read_through(tensors: Mapping[str, Tensor]) -> int:
    """Read every row of every tensor, and return how many weights there were: what a test of a broken file calls."""
    count = 0
    for tensor in tensors.values():
        for start, stop in slices(tensor):
            count += tensor.rows(start, stop).values.size
    return count
