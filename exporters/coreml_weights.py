"""How each tensor is stored in an ML program, and the filling of its blobs from rows of the source.

The graph is built over placeholders that occupy no memory (a single element, broadcast); the numbers go from the
source's rows to weight.bin when the graph is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.coreml_blob import BlobWriter
from gemexport.formats.errors import InputError
from gemexport.formats.tensor import ITEM_BYTES, Floats, Tensor, slices

Storage = Literal["int4", "int8", "fp16", "fp32"]
Fill = Callable[[BlobWriter], None]
F16_MAX = 65504.0


def storage(tensor: Tensor, variant: str) -> Storage:
    """What a 2-D tensor is stored as: its grid's codes where the variant and the tensor have them, else floats.

    Codes of fewer than four bits go into int4. Core ML takes any block that divides a row.
    """
    if variant == "f32":
        return "fp32"
    if variant == "int4" and tensor.grid is not None:
        return "int4" if tensor.grid.bits <= 4 else "int8"
    return "fp16"


def placeholder(shape: tuple[int, ...], dtype: Any) -> NDArray:
    """An array of that shape and type that occupies one element."""
    return np.broadcast_to(np.zeros((), dtype), shape)


@dataclass
class Sources:
    """What fills each blob of the program, and what the containers could not hold."""

    variant: str
    path: str  # of the checkpoint, for errors
    progress: Callable[[int], None]
    fills: list[Fill] = field(default_factory=list)
    rounded: dict[str, int] = field(default_factory=dict)  # tensor -> weights that f16 could not hold
    rescaled: dict[str, int] = field(default_factory=dict)  # tensor -> scales that f16 could not hold

    def floats(self, blob: str, tensor: Tensor, kind: Storage) -> None:
        """Fill `blob` with the tensor's values, rounded to f16 where `kind` says so."""

        def fill(writer: BlobWriter) -> None:
            for start, stop in slices(tensor):
                values = tensor.rows(start, stop).values
                self._note(self.rounded, tensor, values, kind)
                writer.write(blob, halves(values) if kind == "fp16" else values)
                self._advance(tensor, stop - start)

        self.fills.append(fill)

    def grid(self, codes_blob: str, scales_blob: str, tensor: Tensor) -> None:
        """Fill two blobs with the tensor's codes and scales, the codes unchanged."""

        def fill(writer: BlobWriter) -> None:
            for start, stop in slices(tensor):
                codes, scales = tensor.rows(start, stop).grid()
                self._note(self.rescaled, tensor, scales, "fp16")
                writer.write(codes_blob, codes)
                writer.write(scales_blob, halves(scales))
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
        """One sentence for each kind of loss."""
        found = []
        if self.rounded:
            count = sum(self.rounded.values())
            found.append(f"{count} weights of {len(self.rounded)} tensors are no f16 numbers and were rounded")
        if self.rescaled:
            count = sum(self.rescaled.values())
            found.append(f"{count} scales of {len(self.rescaled)} tensors are no f16 numbers and were rounded")
        return found

    def _advance(self, tensor: Tensor, rows: int) -> None:
        self.progress(rows * tensor.shape[1] * ITEM_BYTES[tensor.dtype])

    def _note(self, losses: dict[str, int], tensor: Tensor, values: Floats, kind: Storage) -> None:
        if kind != "fp16":
            return
        if np.abs(values).max(initial=0.0) > F16_MAX:
            problem = f"tensor {tensor.name} has numbers beyond 65504, which float16 cannot hold"
            raise InputError(self.path, problem, "export the f32 variant")
        lost = int(np.count_nonzero(halves(values).astype(np.float32) != values))
        if lost:
            losses[tensor.name] = losses.get(tensor.name, 0) + lost


def halves(values: Floats) -> NDArray[np.float16]:
    """Float32 values rounded to float16, ties to even."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)
