"""Activations as integers: every encoding holds zero, covers its range, and means what ONNX means by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemexport.formats.activations.ranges import (
    ActivationRange,
    ActivationRanges,
    Activations,
    Encoding,
    affine,
    read_ranges,
    static,
    symmetric,
    widened,
)
from gemexport.formats.storage.errors import InputError

BITS = st.sampled_from([8, 16])
# What a scale of float32 can divide without leaving its normal numbers.
SIZES = st.floats(1e-20, 1e20)
FINITE = st.one_of(st.just(0.0), SIZES, SIZES.map(lambda size: -size))


def decode(encoding: Encoding, codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.float64) - encoding.zero_point) * encoding.scale


@given(FINITE, FINITE, BITS)
def test_a_range_is_covered_and_zero_is_exact(one: float, other: float, bits: int) -> None:
    low, high = min(one, other), max(one, other)
    encoding = affine(low, high, bits)
    least, most = encoding.limits
    assert least <= encoding.zero_point <= most
    assert np.float32(encoding.scale) == encoding.scale > 0
    assert decode(encoding, encoding.encode(np.zeros(1)))[0] == 0
    values = np.linspace(low, high, 50)
    # Half a step for rounding, half a step for the zero point that was rounded, and float32's rounding of the scale.
    error = np.abs(decode(encoding, encoding.encode(values)) - values).max()
    assert error <= encoding.scale * (1 + most * 2**-23)


@given(FINITE, FINITE, BITS)
def test_signed_integers_are_symmetric(one: float, other: float, bits: int) -> None:
    encoding = symmetric(min(one, other), max(one, other), bits)
    assert encoding.zero_point == 0
    values = np.array([one, other, 0.0])
    error = np.abs(decode(encoding, encoding.encode(values)) - values)
    assert (error <= encoding.scale * (0.5 + encoding.limits[1] * 2**-23)).all()


@given(st.lists(FINITE, min_size=1, max_size=30), SIZES)
def test_a_static_scale_clamps_as_the_checkpoint_says(values: list[float], scale: float) -> None:
    scale = float(np.float32(scale))
    encoding = static(scale)
    wanted = np.clip(np.rint(np.array(values) / scale), -128, 127) * scale
    np.testing.assert_array_equal(decode(encoding, encoding.encode(np.array(values))), wanted)


@given(FINITE, FINITE)
def test_eight_bits_widen_without_a_change(one: float, other: float) -> None:
    narrow = affine(min(one, other), max(one, other), 8)
    wide = widened(narrow)
    numbers = decode(narrow, np.arange(256))
    np.testing.assert_array_equal(decode(wide, wide.encode(numbers)), numbers)
    assert np.float32(wide.scale) == wide.scale


def test_ranges_come_back_from_a_file_and_what_was_given_comes_first(tmp_path: Path) -> None:
    ranges = ActivationRanges(
        tokens=3, percentile=99.0, ranges={"x": ActivationRange(minimum=-4.0, maximum=2.0, low=-1.0, high=1.0)}
    )
    ranges.save(tmp_path / "ranges.json")
    assert read_ranges(tmp_path / "ranges.json") == ranges
    settings = Activations(bits=16, linear_bits=8, cache_bits=16, ranges=ranges, given={"y": static(0.5)})
    assert settings.encoding("x") == affine(-4.0, 2.0, 16)
    assert settings.encoding("x", 8) == affine(-4.0, 2.0, 8)
    assert settings.cache("x") == symmetric(-4.0, 2.0, 16)
    assert settings.encoding("y") == settings.cache("y") == static(0.5)
    assert settings.model_copy(update={"method": "percentile"}).encoding("x") == affine(-1.0, 1.0, 16)
    with pytest.raises(KeyError):
        settings.encoding("z")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"tokens": 1, "percentile": 1, "ranges": {"x": {"minimum": 1}}}'])
def test_a_file_without_ranges_is_the_users_to_mend(tmp_path: Path, text: str) -> None:
    (tmp_path / "ranges.json").write_text(text)
    with pytest.raises(InputError, match="no activation ranges") as caught:
        read_ranges(tmp_path / "ranges.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        read_ranges(tmp_path / "missing.json")
