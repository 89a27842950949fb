"""Floats of four to eight bits: the levels that codes of the MX and NV formats stand for, and their scales.

E2M1, E2M3 and the scale E8M0 are defined in the OCP Microscaling Formats specification 1.0, E4M3 in OCP's 8-bit
floating point specification (FP8): no infinity, and a NaN in place of each of the two largest magnitudes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.tensor import Floats

Bytes = NDArray[np.uint8]


def _levels(exponent_bits: int, mantissa_bits: int, bias: int) -> tuple[float, ...]:
    """What each code stands for, the sign in its highest bit."""
    steps = 1 << mantissa_bits
    positive = []
    for exponent in range(1 << exponent_bits):
        for mantissa in range(steps):
            # Exponent 0 is subnormal: no leading one, and the step of exponent 1.
            whole = mantissa + (steps if exponent else 0)
            positive.append(whole * 2.0 ** (max(exponent, 1) - bias - mantissa_bits))
    return (*positive, *(-level if level else 0.0 for level in positive))


E2M1 = _levels(2, 1, 1)
E2M3 = _levels(2, 3, 1)
# The codes 0x7F and 0xFF are NaN, which no weight may be; here they have the levels that arithmetic would give them.
E4M3 = _levels(4, 3, 7)
E4M3_NAN = 0x7F
E8M0_NAN = 0xFF
_E8M0_BIAS = 127

_E4M3_VALUES: Floats = np.array(E4M3, dtype=np.float32)
_E4M3_VALUES[[E4M3_NAN, E4M3_NAN | 0x80]] = np.nan


def is_nan_e4m3(codes: Bytes) -> bool:
    """Whether a code is NaN."""
    return bool(((codes & 0x7F) == E4M3_NAN).any())


def from_e4m3(stored: Bytes) -> Floats:
    """The values of E4M3 bytes; NaN stays NaN."""
    values: Floats = _E4M3_VALUES[stored]
    return values


def to_e4m3(values: Floats) -> Bytes | None:
    """The bytes of values that are E4M3 numbers; None when one is not."""
    magnitudes = _E4M3_VALUES[:E4M3_NAN]
    size = np.abs(values)
    codes = np.minimum(np.searchsorted(magnitudes, size), E4M3_NAN - 1).astype(np.uint8)
    if not np.array_equal(magnitudes[codes], size):
        return None
    return codes | (np.signbit(values).astype(np.uint8) << np.uint8(7))


def from_e8m0(stored: Bytes) -> Floats:
    """The powers of two that E8M0 bytes stand for, 2**(byte - 127); 255 is NaN."""
    exponents = np.minimum(stored, E8M0_NAN - 1).astype(np.int32) - _E8M0_BIAS
    values = np.ldexp(np.float32(1), exponents).astype(np.float32)
    values[stored == E8M0_NAN] = np.nan
    return values


def to_e8m0(values: Floats) -> Bytes | None:
    """The bytes of values that are powers of two from 2**-127 to 2**127; None when one is not."""
    mantissas, exponents = np.frexp(values)
    stored = exponents.astype(np.int32) - 1 + _E8M0_BIAS
    if not ((mantissas == 0.5) & (stored >= 0) & (stored < E8M0_NAN)).all():
        return None
    return stored.astype(np.uint8)


def multiple(levels: tuple[float, ...], of: tuple[float, ...]) -> float | None:
    """The factor by which `levels` are `of`, which has a level of 1; None when they are something else."""
    if len(levels) != len(of):
        return None
    factor = levels[of.index(1.0)]
    return factor if factor > 0 and levels == scaled(of, factor) else None


def scaled(levels: tuple[float, ...], factor: float) -> tuple[float, ...]:
    """Every level times a factor."""
    return tuple(level * factor for level in levels)
