"""The distance of two models' vectors of the same texts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gemexport.validators.checks.distance import Distance, compared


def turned(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), math.sin(angle)]], np.float32)


def test_distance_is_one_less_the_cosine_without_cancellation() -> None:
    distance, error = compared(turned(0.3), turned(0.5))
    assert distance == pytest.approx(1 - math.cos(0.2), rel=1e-5)
    assert error == pytest.approx(2 * math.sin(0.1), rel=1e-5)
    p = np.array([1.0, 0.0], np.float32)
    tiny, _ = compared(p, np.array([1.0, 1e-7], np.float32))
    assert tiny == pytest.approx(5e-15, rel=1e-3)  # in f32 the cosine is 1


def test_another_length_is_an_error_and_no_distance() -> None:
    distance, error = compared(turned(1.0), 3 * turned(1.0))
    assert distance < 1e-14
    assert error == pytest.approx(2.0)


@pytest.mark.parametrize("broken", [np.zeros((1, 2)), np.array([[np.nan, 1.0]]), np.array([[np.inf, 1.0]])])
def test_what_is_no_vector_is_nan(broken: np.ndarray) -> None:
    total = Distance()
    total.add(turned(0.1), turned(0.1), [1])
    total.add(turned(0.1), broken.astype(np.float32), [1])
    total.add(turned(0.1), turned(0.1), [1])
    assert math.isnan(total.distance_mean)
    assert math.isnan(total.distance_max)


def test_spread_and_kinds() -> None:
    total = Distance()
    for angle, off in ((0.0, 0.1), (math.pi / 2, 0.0), (math.pi, 0.0)):
        total.add(turned(angle), turned(angle + off), [1, 2])
    assert total.spread == pytest.approx((1 + 1 + 2) / 3)  # right angles twice, and the opposite
    kinds = total.by_kind([("a", 2), ("b", 2), ("b", 2)])
    assert (kinds["a"].texts, kinds["b"].texts) == (1, 2)
    assert kinds["a"].distance_mean == pytest.approx(1 - math.cos(0.1), rel=1e-4)
    assert kinds["b"].distance_mean < 1e-12
    assert Distance().spread is None
