"""Static quantization of activations in an ML program: `quantize` and `dequantize` with the scale of a checkpoint."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

Var = Any
Integer = Literal["int8", "uint8"]  # Core ML has no wider ones for this


def rounded(x: Var, scale: float, name: str, zero_point: int = 0, kind: Integer = "int8") -> Var:
    """`x` as 8-bit codes have it, float32: scale * (clamp(round(x / scale) + zero_point) - zero_point), ties to even.

    Both operations want the scale in the type of what is quantized; float32 holds it as it is, and a float16 `x` too.
    Raises ValueError for a scale that is not positive or a zero point that is no code.
    """
    limits = np.iinfo(kind)
    if not scale > 0 or not limits.min <= zero_point <= limits.max:
        raise ValueError(f"{name}: no {kind} codes have the scale {scale} and the zero point {zero_point}")
    beside: dict[str, Any] = {"scale": np.float32(scale)}
    if zero_point:
        beside["zero_point"] = np.dtype(kind).type(zero_point)
    if x.dtype != types.fp32:
        x = mb.cast(x=x, dtype="fp32", name=f"{name}_wide")
    codes = mb.quantize(input=x, output_dtype=kind, name=f"{name}_codes", **beside)
    return mb.dequantize(input=codes, name=name, **beside)
