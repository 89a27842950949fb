"""The middle form: a tensor read row by row, with the integer grid that its values lie on, if they lie on one.

Readers yield it, writers ask it one question: can I hold this grid exactly? `w = code * scale`, where `block`
consecutive weights of a row share one scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

DType = Literal["bf16", "f16", "f32"]
Floats = NDArray[np.float32]
Codes = NDArray[np.int8]

ITEM_BYTES: dict[DType, int] = {"bf16": 2, "f16": 2, "f32": 4}


@dataclass(frozen=True)
class Grid:
    """What the values of a tensor are multiples of."""

    bits: int  # codes lie in [-2**(bits - 1), 2**(bits - 1) - 1]
    block: int  # consecutive weights along the last axis that share a scale; divides the row
    scale_dtype: DType  # the narrowest dtype that holds every scale
    lossless: bool  # codes * scales, rounded to the tensor's dtype, are the source's values bit for bit


@dataclass(frozen=True)
class Rows:
    """A slice of rows `[rows, in]`; codes and scales only of a tensor that has a grid."""

    values: Floats  # [rows, in], the tensor's own values
    codes: Codes | None = None  # [rows, in]
    scales: Floats | None = None  # [rows, in // block]

    def grid(self) -> tuple[Codes, Floats]:
        """Codes and scales of a slice that has them; asking a plain tensor for them is a bug."""
        if self.codes is None or self.scales is None:
            raise ValueError("these rows have no grid")
        return self.codes, self.scales


class Tensor(Protocol):
    """A named tensor that can be read a slice of rows at a time."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def grid(self) -> Grid | None: ...

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of a 2-D tensor `[out, in]`, read now."""
        ...

    def numpy(self) -> Floats:
        """The whole tensor in its own shape: for norms and scalars, and for whoever holds a model anyway."""
        ...


def slices(tensor: Tensor, target_bytes: int = 16 << 20) -> Iterator[tuple[int, int]]:
    """Ranges of rows `(start, stop)` that cover a 2-D tensor, each of about `target_bytes` as float32."""
    out, width = tensor.shape
    step = max(1, target_bytes // (4 * max(width, 1)))
    for start in range(0, out, step):
        yield start, min(start + step, out)


def expand(scales: Floats, block: int) -> Floats:
    """Scales `[rows, in // block]` repeated to one a weight, `[rows, in]`."""
    return np.repeat(scales, block, axis=1)


def reblock(scales: Floats, block: int, target: int) -> Floats | None:
    """Scales for blocks of `target` weights out of scales for blocks of `block`: repeated, never changed.

    None when a target block would span two scales.
    """
    if block == target:
        return scales
    return np.repeat(scales, block // target, axis=1) if block % target == 0 else None


def from_bf16(bits: NDArray[np.uint16]) -> Floats:
    """The float32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: Floats) -> NDArray[np.uint16]:
    """The bit patterns of float32 values rounded to bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = np.isnan(values)
    return np.where(nan, np.uint32(0x7FC0), rounded).astype(np.uint16)


def round_to(values: Floats, dtype: DType) -> Floats:
    """Float32 values rounded to what `dtype` can hold, as float32."""
    if dtype == "bf16":
        return from_bf16(to_bf16(values))
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return values.astype(np.float32, copy=False)


def narrowest(scales: Floats) -> DType:
    """The narrowest dtype that holds every scale exactly: bf16 first, then f16, else f32."""
    for dtype in ("bf16", "f16"):
        if np.array_equal(round_to(scales, dtype), scales):
            return dtype
    return "f32"


class ArrayTensor:
    """A tensor that is already in memory: small ones, and those of tests."""

    def __init__(
        self,
        name: str,
        values: Floats,
        dtype: DType = "f32",
        codes: Codes | None = None,
        scales: Floats | None = None,
        grid: Grid | None = None,
    ) -> None:
        self.name = name
        self.shape: tuple[int, ...] = tuple(values.shape)
        self.dtype: DType = dtype
        self.grid = grid
        self._rows = Rows(values, codes, scales)

    def rows(self, start: int, stop: int) -> Rows:
        values, codes, scales = self._rows.values, self._rows.codes, self._rows.scales
        return Rows(
            values[start:stop],
            None if codes is None else codes[start:stop],
            None if scales is None else scales[start:stop],
        )

    def numpy(self) -> Floats:
        return self._rows.values
