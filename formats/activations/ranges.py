"""Measured activations: the ranges that activations were seen in, and the integers that those ranges become.

An activation goes by a key: the linear, norm or cache that it belongs to (`model.layers.0.mlp.up_proj.output`), or the
name of its value in the graph. Ranges are kept as JSON, so that measuring them is a step of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import atomic
from gemexport.formats.storage.reading import JSON_BYTES, read_bytes

Bits = Literal[8, 16]
Method = Literal["minmax", "percentile"]


class Encoding(BaseModel):
    """Integers for real numbers: x = (q - zero_point) * scale, with q clipped to what its type holds."""

    model_config = ConfigDict(frozen=True)

    bits: Bits
    signed: bool
    scale: float  # positive, a float32
    zero_point: int

    @property
    def numpy(self) -> np.dtype[np.integer]:
        """The integers' dtype."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits // 8}")

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest q."""
        info = np.iinfo(self.numpy)
        return int(info.min), int(info.max)

    def encode(self, values: NDArray[np.floating]) -> NDArray[np.integer]:
        """The nearest integers, ties to even, as QuantizeLinear of ONNX has it."""
        low, high = self.limits
        rounded = np.rint(np.asarray(values, np.float64) / self.scale) + self.zero_point
        codes: NDArray[np.integer] = np.clip(rounded, low, high).astype(self.numpy)
        return codes


def affine(low: float, high: float, bits: Bits) -> Encoding:
    """Unsigned integers that cover `low` to `high` and hold zero exactly."""
    low, high, most = min(low, 0.0), max(high, 0.0), (1 << bits) - 1
    scale = _float32((high - low) / most)
    return Encoding(bits=bits, signed=False, scale=scale, zero_point=min(max(round(-low / scale), 0), most))


def symmetric(low: float, high: float, bits: Bits) -> Encoding:
    """Signed integers around a zero point of 0 that cover `low` to `high`."""
    most = (1 << (bits - 1)) - 1
    return Encoding(bits=bits, signed=True, scale=_float32(max(-low, high, 0.0) / most), zero_point=0)


def static(scale: float) -> Encoding:
    """A checkpoint's own int8 scale, clamp(round(x/s), -128, 127)·s, as unsigned integers: the same numbers."""
    return Encoding(bits=8, signed=False, scale=_float32(scale), zero_point=128)


def widened(encoding: Encoding) -> Encoding:
    """16-bit integers that hold every number of an unsigned 8-bit encoding exactly."""
    return Encoding(bits=16, signed=False, scale=encoding.scale / 256, zero_point=encoding.zero_point * 256)


def _float32(scale: float) -> float:
    """A scale as ONNX stores it; activations that were always zero get one that means nothing."""
    return float(np.float32(scale)) or 1.0


class ActivationRange(BaseModel):
    """What was seen of one activation."""

    model_config = ConfigDict(frozen=True)

    minimum: float
    maximum: float
    low: float  # all but a few values of a chunk of tokens lie above it, averaged over the chunks
    high: float  # and below this


class ActivationRanges(BaseModel):
    """The activations of a model on some text, by key."""

    model_config = ConfigDict(frozen=True)

    tokens: int
    percentile: float  # the share of the values between low and high, in percent, is at least 2 * percentile - 100
    ranges: dict[str, ActivationRange]

    def limits(self, key: str, method: Method) -> tuple[float, float]:
        """The range of an activation by one of the two measures; KeyError when it was not measured."""
        found = self.ranges[key]
        return (found.minimum, found.maximum) if method == "minmax" else (found.low, found.high)

    def save(self, path: Path) -> None:
        """Write the ranges as JSON."""
        with atomic(path) as partial:
            partial.write_text(self.model_dump_json(indent=1) + "\n", "utf-8")


def read_ranges(path: Path) -> ActivationRanges:
    """The ranges in a JSON file; InputError when it holds none."""
    try:
        return ActivationRanges.model_validate_json(read_bytes(Path(path), JSON_BYTES))
    except (OSError, ValidationError) as error:
        raise InputError(path, "holds no activation ranges", "give what a calibration wrote") from error


class Activations(BaseModel):
    """How the activations of a graph become integers: a checkpoint's own scales first, measured ranges else.

    Without `ranges` the graph stays in floating point, to be measured.
    """

    model_config = ConfigDict(frozen=True)

    bits: Bits  # of everything but the three below
    linear_bits: Bits  # of what a linear reads and writes
    cache_bits: Bits  # of cached keys and values
    method: Method = "minmax"
    ranges: ActivationRanges | None = None
    given: Mapping[str, Encoding] = {}

    def encoding(self, key: str, bits: Bits | None = None) -> Encoding:
        """The integers of an activation."""
        if key in self.given:
            return self.given[key]
        return affine(*self._limits(key), bits or self.bits)

    def width(self, key: str, bits: Bits | None = None) -> Bits:
        """How many bits the integers of an activation have."""
        return self.given[key].bits if key in self.given else bits or self.bits

    def cache(self, key: str) -> Encoding:
        """The integers of cached keys or values: the NPU multiplies by signed 16-bit or unsigned 8-bit ones."""
        if key in self.given:
            return self.given[key]
        return (symmetric if self.cache_bits == 16 else affine)(*self._limits(key), self.cache_bits)

    def _limits(self, key: str) -> tuple[float, float]:
        if self.ranges is None:
            raise ValueError("no ranges were measured")
        return self.ranges.limits(key, self.method)
