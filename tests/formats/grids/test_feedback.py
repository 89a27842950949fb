"""Codes chosen together lose less of what a matrix makes of its inputs than codes chosen one by one."""

from __future__ import annotations

import numpy as np
import pytest

from gemexport.formats.grids import rounding
from gemexport.formats.grids.feedback import DAMPING, PANEL, Inputs, error, fit
from gemexport.formats.grids.lattice import encode
from gemexport.formats.tensor import Codes, Floats, holding, round_to


def inputs(width: int, tokens: int = 400, rank: int = 24, seed: int = 0) -> Floats:
    """H of inputs that mostly lie in few directions, as those of a language model do."""
    stream = np.random.default_rng(seed)
    found = stream.standard_normal((tokens, rank)) @ stream.standard_normal((rank, width))
    found += 0.1 * stream.standard_normal((tokens, width))
    return (found.T @ found).astype(np.float32)


def one_by_one(values: Floats, bits: int) -> tuple[Codes, Floats]:
    scales = rounding.fit(values, 32, bits)
    return encode(values, scales, bits), scales


@pytest.mark.parametrize("width", [32, PANEL, 2 * PANEL + 96])
def test_the_factor_is_of_h(width: int) -> None:
    gram = inputs(width)
    seen = Inputs.of(gram.copy())
    damped = gram[np.ix_(seen.order, seen.order)] + DAMPING * np.diagonal(gram).mean() * np.eye(width)
    np.testing.assert_allclose(seen.gram[np.ix_(seen.order, seen.order)], damped, rtol=1e-5)
    np.testing.assert_array_equal(np.tril(seen.factor, -1), 0)
    np.testing.assert_array_equal(np.diagonal(seen.factor), 1)
    whole = np.linalg.cholesky(damped[::-1, ::-1].astype(np.float64))[::-1, ::-1]
    np.testing.assert_allclose(seen.factor, whole / np.diagonal(whole), atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_less_is_lost_than_by_rounding_each_weight(bits: int) -> None:
    values = np.random.default_rng(1).standard_normal((40, 192)).astype(np.float32)
    seen = Inputs.of(inputs(192))
    codes, scales = fit(values, seen, 32, bits)
    assert (codes.dtype, codes.shape, scales.shape) == (np.int8, values.shape, (40, 6))
    assert codes.min() >= -(1 << bits - 1)
    assert codes.max() < 1 << bits - 1
    assert holding(scales) == ("bf16", "f16")
    assert error(values, seen, codes, scales) < 0.35 * error(values, seen, *one_by_one(values, bits))


def test_without_correlation_each_weight_is_rounded_by_itself() -> None:
    values = np.random.default_rng(2).standard_normal((8, 64)).astype(np.float32)
    codes, scales = fit(values, Inputs.of(np.eye(64, dtype=np.float32)), 32, 4, rounds=0)
    np.testing.assert_array_equal(codes, encode(values, scales, 4))


def test_rows_do_not_know_each_other() -> None:
    values = np.random.default_rng(3).standard_normal((9, 96)).astype(np.float32)
    seen = Inputs.of(inputs(96))
    whole = fit(values, seen, 32, 4)
    parts = [fit(values[rows], seen, 32, 4) for rows in (slice(0, 5), slice(5, 9))]
    np.testing.assert_array_equal(whole[0], np.concatenate([codes for codes, _ in parts]))


def test_a_lattice_is_found_again() -> None:
    stream = np.random.default_rng(4)
    codes = stream.integers(-8, 8, (6, 64)).astype(np.int8)
    codes[:, ::32] = -8
    scales = round_to(stream.uniform(0.01, 0.02, (6, 2)).astype(np.float32), "bf16")
    found, same = fit(codes * np.repeat(scales, 32, axis=1), Inputs.of(inputs(64)), 32, 4)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(same, scales)


@pytest.mark.parametrize("gram", [np.zeros((64, 64), np.float32), np.ones((64, 64), np.float32)])
def test_inputs_that_say_little(gram: Floats) -> None:
    values = np.random.default_rng(5).standard_normal((4, 64)).astype(np.float32)
    values[0] = 0
    codes, scales = fit(values, Inputs.of(gram), 32, 4)
    off = values - codes * np.repeat(scales, 32, axis=1)
    assert not codes[0].any()
    assert np.isfinite(scales).all()
    assert np.square(off).sum() < 0.2 * np.square(values).sum()
