"""A matrix of the base with an adapter's product added, row by row as it is read: w + scaling * B @ A, in float32.

DoRA (https://arxiv.org/abs/2402.09353) then gives each row of the sum the length that it has learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.grids.lattice import jit
from gemexport.formats.storage.safetensors import MappedArray, MappedTensor
from gemexport.formats.tensor import DType, Floats, Grid, Rows, Tensor, TensorBase


@dataclass(frozen=True)
class Factors:
    """The two factors of one module, mapped: `left` `[out, rank]` times `right` `[rank, in]`, times `scaling`."""

    a: MappedArray
    b: MappedArray
    embedding: bool  # its rows are the columns of A, its columns the rows of B
    scaling: float
    magnitude: MappedArray | None = None  # of DoRA: what each row's norm is made

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product, `[out, in]`."""
        inner, outer = self.a.entry.shape[1], self.b.entry.shape[0]
        return (inner, outer) if self.embedding else (outer, inner)

    def left(self, start: int, stop: int) -> Floats:
        """Rows of the left factor."""
        if self.embedding:
            return np.ascontiguousarray(floats(self.a)[:, start:stop].T)
        return np.ascontiguousarray(MappedTensor(self.b).rows(start, stop).values)

    def norms(self, start: int, stop: int) -> NDArray[np.float64]:
        """What the norms of these rows are brought to; none where they stay what the sum makes them."""
        return np.zeros(0) if self.magnitude is None else floats(self.magnitude).reshape(-1)[start:stop].astype(float)

    def right(self) -> Floats:
        """The whole right factor: a thin one."""
        return np.ascontiguousarray(floats(self.b).T if self.embedding else floats(self.a))


class MergedTensor(TensorBase):
    """A tensor of the base with its adapter's product added, in float32 and on no grid; the base stays as it is."""

    grid: Grid | None = None
    dtype: DType = "f32"

    def __init__(self, base: Tensor, factors: Factors) -> None:
        self.name, self.shape = base.name, base.shape
        self._base, self._factors = base, factors

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`, merged now."""
        values = np.ascontiguousarray(self._base.rows(start, stop).values, dtype=np.float32)
        left, norms = self._factors.left(start, stop), self._factors.norms(start, stop)
        return Rows(_merged(values, left, self._factors.right(), self._factors.scaling, norms))


@jit
def _merged(
    values: NDArray[np.float32],
    left: NDArray[np.float32],
    right: NDArray[np.float32],
    scaling: float,
    norms: NDArray[np.float64],
) -> NDArray[np.float32]:
    """values + scaling * left @ right, rounded once: sums in float64 and in a fixed order, however rows are sliced.

    Where `norms` are given, each row is then made as long as its one says.
    """
    result = np.empty_like(values)
    total = np.empty(values.shape[1], np.float64)
    for row in range(values.shape[0]):
        total[:] = 0.0
        for k in range(left.shape[1]):
            factor = np.float64(left[row, k])
            for i in range(values.shape[1]):
                total[i] += factor * np.float64(right[k, i])
        energy = 0.0
        for i in range(values.shape[1]):
            total[i] = np.float64(values[row, i]) + scaling * total[i]
            energy += total[i] * total[i]
        longer = norms[row] / np.sqrt(energy) if norms.size and energy > 0.0 else 1.0
        for i in range(values.shape[1]):
            result[row, i] = np.float32(longer * total[i])
    return result


def floats(stored: MappedArray) -> Floats:
    return MappedTensor(stored).numpy()
