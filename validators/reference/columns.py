"""NumPy's files written some columns at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np

from gemexport.formats.tensor import Floats


class Columns:
    """A new `.npy` file at `path` of an f32 matrix of this shape, row after row as NumPy reads it.

    Written rather than mapped: a full disk is an error then, and no signal that ends the process.
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self._rows, self._width = shape
        self._file = path.open("wb")
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._start = self._file.tell()

    def __enter__(self) -> Self:
        return self

    def write(self, first: int, values: Floats) -> None:
        """Put `values` `[rows, some]` at the columns from `first` on."""
        for row in range(self._rows):
            self._file.seek(self._start + 4 * (row * self._width + first))
            self._file.write(values[row].astype("<f4").tobytes())

    def __exit__(self, *error: object) -> None:
        self._file.close()
