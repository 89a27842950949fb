"""Typed questions to a GGUF file's metadata: the value, a default, or an InputError that names the key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemexport.formats.gguf.container import MENDED, Strings
from gemexport.formats.storage.errors import InputError

LARGEST = 1 << 31  # of any count in a config: what is above is a lie, and arithmetic with it might overflow


class Metadata:
    """Keys of the architecture are given as in gguf's `Keys`, with `{arch}` in them."""

    def __init__(self, path: Path, values: Mapping[str, Any], arch: str) -> None:
        self.path = path
        self._values = values
        self._arch = arch

    def has(self, key: str) -> bool:
        """Whether there is such a key."""
        return self._name(key) in self._values

    def has_array(self, key: str) -> bool:
        """Whether the key has an array of numbers or truth values."""
        return isinstance(self._get(key), np.ndarray)

    def wrong(self, key: str, wanted: str) -> InputError:
        """An error that names a key, what it is and what it should be."""
        value = self._get(key)
        shown = f"an array of {len(value)}" if isinstance(value, (np.ndarray, Strings)) else repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}…"
        return InputError(self.path, f"{self._name(key)} is {shown} and should be {wanted}", MENDED)

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number, `least` or more; an array of one number for all layers counts as that number."""
        value = self._get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if type(value) is not int or not least <= value < LARGEST:
            raise self.wrong(key, f"a whole number from {least} up")
        return value

    def index(self, key: str, size: int) -> int | None:
        """A whole number below `size`; None when the key is missing or the number is not (as llama.cpp has it)."""
        value = self._get(key)
        return value if type(value) is int and 0 <= value < size else None

    def number(self, key: str, default: float | None = None) -> float:
        """A finite float, as the shortest decimal that rounds to the float32 in the file: 1e-06, not 9.99…e-07."""
        value = self._get(key, default)
        if type(value) not in (int, float):
            raise self.wrong(key, "a number")
        with np.errstate(over="ignore"):
            shortest = float(str(np.float32(value)))
        if not math.isfinite(shortest):
            raise self.wrong(key, "a number")
        return shortest

    def positive(self, key: str, default: float | None = None) -> float:
        """As `number`, more than zero."""
        value = self.number(key, default)
        if value <= 0:
            raise self.wrong(key, "more than 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def texts(self, key: str) -> Sequence[str]:
        """An array of strings."""
        value = self._get(key)
        if not isinstance(value, Strings):
            raise self.wrong(key, "an array of texts")
        return value

    def counts(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """A whole number a layer, one or more; a single one stands for all layers."""
        value = self._get(key, default)
        if type(value) is int:
            value = np.full(layers, value) if abs(value) < LARGEST else value
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) != layers:
            raise self.wrong(key, f"a whole number, or {layers} of them as block_count says")
        if not ((value >= 1) & (value < LARGEST)).all():
            raise self.wrong(key, "whole numbers from 1 up")
        return [int(item) for item in value]

    def array(self, key: str, size: int, kinds: str, wanted: str) -> list[Any]:
        """An array of `size` items of NumPy's `kinds` (b, i, u, f), as Python's own."""
        value = self._get(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or len(value) != size:
            raise self.wrong(key, f"{size} {wanted}")
        items: list[Any] = value.tolist()
        return items

    def _name(self, key: str) -> str:
        return key.replace("{arch}", self._arch)

    def _get(self, key: str, default: Any = None) -> Any:
        return self._values.get(self._name(key), default)
