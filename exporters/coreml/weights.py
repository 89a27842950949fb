"""The filling of an ML program's blobs from rows of the source.

The graph is built over placeholders that occupy no memory (a single element, broadcast); the numbers go from the
source's rows to weight.bin when the graph is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.exporters.coreml.forms import NUMBERS, Float, Form, halves, row_slices, split
from gemexport.formats.coreml import BIASES, SCALES
from gemexport.formats.coreml.blob import BlobWriter
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import ITEM_BYTES, Floats, Grid, Tensor

Fill = Callable[[BlobWriter], None]
F16_MAX = 65504.0


def placeholder(shape: tuple[int, ...], dtype: Any) -> NDArray:
    """An array of that shape and type that occupies one element."""
    return np.broadcast_to(np.zeros((), dtype), shape)


@dataclass
class Sources:
    """What fills each blob of the program, and what float16 could not hold."""

    variant: str
    path: str  # of the checkpoint, for errors
    progress: Callable[[int], None]
    fills: list[Fill] = field(default_factory=list)
    rounded: dict[str, int] = field(default_factory=dict)  # tensor -> weights that f16 could not hold

    def floats(self, blob: str, tensor: Tensor, kind: Float) -> None:
        """Fill `blob` with the tensor's values, rounded to f16 where `kind` says so."""

        def fill(writer: BlobWriter) -> None:
            for start, stop in row_slices(tensor):
                values = tensor.rows(start, stop).values
                if kind == "fp16":
                    self._check(tensor, values)
                    self._note(tensor, values)
                writer.write(blob, halves(values) if kind == "fp16" else values)
                self._advance(tensor, stop - start)

        self.fills.append(fill)

    def grid(self, stored: str, tensor: Tensor, form: Form) -> None:
        """Fill the blobs of a matrix on a grid, whose form holds every number as it is."""
        grid = tensor.grid
        assert grid is not None
        # A signed code's place in a table that begins with the lowest one.
        first = 1 << (grid.bits - 1) if grid.kind == "symmetric" and form.table is not None else 0
        largest = _largest_level(grid)

        def fill(writer: BlobWriter) -> None:
            for start, stop in row_slices(tensor):
                rows = tensor.rows(start, stop)
                codes, scales = rows.grid()
                if form.scales == "fp16":
                    self._check(tensor, scales * np.float32(largest))
                writer.write(f"{stored}_codes", codes + codes.dtype.type(first) if first else codes)
                writer.write(f"{stored}_scales", scales.astype(NUMBERS[form.scales]))
                if rows.shifts is not None:
                    zeros, rest = split(grid, scales, rows.shifts) if grid.kind == "affine" else (rows.shifts, None)
                    writer.write(f"{stored}_offsets", zeros)
                    if rest is not None and form.biases is not None:
                        writer.write(f"{stored}{BIASES}", rest)
                self._advance(tensor, stop - start)

        self.fills.append(fill)

    def vectors(self, stored: str, tensor: Tensor, grid: Grid, kind: Float) -> None:
        """Fill the blobs of a matrix in the vector codec: codes by codebook, and scales."""

        def fill(writer: BlobWriter) -> None:
            for start, stop in row_slices(tensor):
                codes, scales = tensor.rows(start, stop).grid()
                for m in range(grid.codebooks):
                    writer.write(f"{stored}_codes_{m}", codes[:, :, m])
                writer.write(f"{stored}{SCALES}", scales)
                self._advance(tensor, stop - start)

        self.fills.append(fill)

    def array(self, blob: str, shape: tuple[int, int], rows: Callable[[int, int], Floats]) -> None:
        """Fill `blob` with a table of the graph's own, given by rows."""

        def fill(writer: BlobWriter) -> None:
            step = max(1, (4 << 20) // shape[1])
            for start in range(0, shape[0], step):
                writer.write(blob, rows(start, min(start + step, shape[0])))

        self.fills.append(fill)

    def write(self, writer: BlobWriter, constants: Mapping[str, NDArray]) -> None:
        """Fill every blob; those that no source fills are small constants of the graph."""
        for fill in self.fills:
            fill(writer)
        for name, values in constants.items():
            if writer.empty(name):
                writer.write(name, values)

    def notes(self) -> list[str]:
        """What was lost, in a sentence; none where nothing was."""
        if not self.rounded:
            return []
        count = sum(self.rounded.values())
        return [f"{count} weights of {len(self.rounded)} tensors are no f16 numbers and were rounded"]

    def _advance(self, tensor: Tensor, rows: int) -> None:
        self.progress(rows * tensor.shape[-1] * ITEM_BYTES[tensor.dtype])

    def _check(self, tensor: Tensor, values: Floats) -> None:
        if np.abs(values).max(initial=0.0) > F16_MAX:
            problem = f"tensor {tensor.name} has numbers beyond 65504, which float16 cannot hold"
            raise InputError(self.path, problem, "export the f32 variant")

    def _note(self, tensor: Tensor, values: Floats) -> None:
        lost = int(np.count_nonzero(halves(values).astype(np.float32) != values))
        if lost:
            self.rounded[tensor.name] = self.rounded.get(tensor.name, 0) + lost


def _largest_level(grid: Grid) -> float:
    """The largest magnitude that a scale is multiplied with."""
    if grid.kind == "codebook":
        return max(abs(level) for level in grid.levels)
    return float(1 << (grid.bits - 1 if grid.kind == "symmetric" else grid.bits))
