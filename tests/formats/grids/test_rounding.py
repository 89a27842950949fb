"""Round-to-nearest on least-squares scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemexport.formats.grids.lattice import encode
from gemexport.formats.grids.rounding import fit
from gemexport.formats.tensor import Floats, expand, round_to


def error(values: Floats, scales: Floats, bits: int) -> float:
    difference = values - encode(values, scales, bits) * expand(scales, 32)
    return float(np.square(difference, dtype=np.float64).sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_better_than_rounding_by_the_largest_weight(bits: int) -> None:
    values = np.random.Generator(np.random.PCG64(0)).standard_normal((64, 256)).astype(np.float32)
    peak = np.abs(values).reshape(64, -1, 32).max(-1)
    naive = round_to((peak / ((1 << (bits - 1)) - 1)).astype(np.float32), "f16")
    assert error(values, fit(values, 32, bits), bits) < error(values, naive, bits)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), exponent=st.integers(-20, 10), bits=st.sampled_from([2, 4, 8]))
def test_scales_are_f16_numbers_and_the_error_is_bounded(seed: int, exponent: int, bits: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    values = (generator.standard_normal((2, 64)) * 2.0**exponent).astype(np.float32)
    scales = fit(values, 32, bits)
    assert np.array_equal(round_to(scales, "f16"), scales)
    # Rounding all weights to zero is the error to beat; it is all that is left where f16 has no scale so small.
    energy = float(np.square(values, dtype=np.float64).sum())
    assert error(values, scales, bits) < energy if scales.any() else np.abs(values).max() < 127 * 2.0**-24


def test_a_block_of_zeros_has_the_scale_zero() -> None:
    assert fit(np.zeros((1, 32), dtype=np.float32), 32, 4).tolist() == [[0.0]]
