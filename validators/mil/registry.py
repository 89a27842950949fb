"""The registry of MIL operations that the evaluator knows, and the weights that some of them read by rows.

An operation is a function of its inputs by MIL's own names: floats and integers as tensors, strings as strings,
variadic inputs as lists. Floats are float32 whatever the program declares; the evaluator rounds what comes out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemexport.formats.coreml.arrays import Array

Operation = Callable[..., Any]
OPERATIONS: dict[str, Operation] = {}
BY_ROWS: dict[str, frozenset[str]] = {}  # operation -> its inputs that may come as a Weight


class Unsupported(Exception):
    """An operation is known, but not in the way that it is used."""


def op(*names: str, by_rows: tuple[str, ...] = ()) -> Callable[[Operation], Operation]:
    """Register a function as the MIL operation(s) of these names; inputs in `by_rows` may be a `Weight`."""

    def register(function: Operation) -> Operation:
        for name in names:
            OPERATIONS[name] = function
            BY_ROWS[name] = frozenset(by_rows)
        return function

    return register


def parameters(kind: str) -> set[str]:
    """The inputs that an operation has."""
    return set(inspect.signature(OPERATIONS[kind]).parameters)


class Weight:
    """A constant that stays in its file until an operation asks for it, `[rows, …]`."""

    def __init__(self, array: Array, half: bool) -> None:
        self.shape = array.shape
        self._array = array
        self._half = half and array.kind == "fp16"  # a runtime dequantizes into the scale's type
        self._held: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole as float32."""
        return 4 * int(np.prod(self.shape, dtype=np.int64))

    def hold(self) -> None:
        """Keep the whole in memory from now on."""
        self._held = self.whole()

    @property
    def held(self) -> Tensor | None:
        """The whole, if it is kept in memory."""
        return self._held

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` along the first axis."""
        if self._held is not None:
            return self._held[start:stop]
        return round_half(as_tensor(self._array.rows(start, stop))) if self._half else self._exact(start, stop)

    def _exact(self, start: int, stop: int) -> Tensor:
        return as_tensor(self._array.rows(start, stop))

    def whole(self) -> Tensor:
        """All of it, read a slice at a time."""
        if self._held is not None:
            return self._held
        step = max(1, (16 << 20) * self.shape[0] // max(self.nbytes, 1))
        parts = [self.rows(i, min(i + step, self.shape[0])) for i in range(0, self.shape[0], step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def pick(self, indices: Tensor) -> Tensor:
        """`[*indices.shape, …]`: these rows, each read by itself unless the whole is held."""
        flat = indices.reshape(-1).tolist()
        if self._held is not None:
            found = self._held[torch.tensor(flat, dtype=torch.long)]
        else:
            unique = {row: self.rows(row, row + 1) for row in sorted(set(flat))}
            found = torch.cat([unique[row] for row in flat]) if flat else torch.empty(0, *self.shape[1:])
        return found.reshape((*indices.shape, *self.shape[1:]))


def as_tensor(values: np.ndarray) -> Tensor:
    """A tensor of `values`: floats as float32, unsigned 16- and 32-bit integers widened, the rest as they are."""
    if values.dtype.kind == "f":
        values = values.astype(np.float32, copy=False)
    elif values.dtype.kind == "u" and values.itemsize > 1:
        values = values.astype(np.int64)
    values = np.ascontiguousarray(values).reshape(values.shape)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def round_half(values: Tensor) -> Tensor:
    """Float32 values rounded to float16; beyond 65504 they become infinite, as they do in the runtime."""
    return values.half().float()


def integer(value: Any) -> int:
    """A scalar input as an int."""
    return int(value.item()) if isinstance(value, Tensor) else int(value)


def number(value: Any) -> float:
    """A scalar input as a float."""
    return float(value.item()) if isinstance(value, Tensor) else float(value)


def flag(value: Any) -> bool:
    """A scalar input as a bool."""
    return bool(value.item()) if isinstance(value, Tensor) else bool(value)


def integers(value: Any) -> list[int]:
    """A vector input as a list of ints."""
    return [int(item) for item in (value.reshape(-1).tolist() if isinstance(value, Tensor) else value)]
