"""The weights validator counts what is exact, and is fooled by nothing."""

from __future__ import annotations

import numpy as np
import pytest

from gemexport.formats.lattice import encode, search
from gemexport.formats.tensor import ArrayTensor, DType, Floats, Grid, round_to
from gemexport.validators.weights import TensorComparison, compare


def lattice() -> Floats:
    generator = np.random.Generator(np.random.PCG64(0))
    codes = generator.integers(-8, 8, (8, 2, 32)).astype(np.float32)
    scales = round_to(generator.uniform(0.01, 0.02, (8, 2, 1)).astype(np.float32), "bf16")
    return round_to(codes * scales, "bf16").reshape(8, 64)


def on_grid(values: Floats, scale_dtype: DType = "bf16", factor: float = 1.0) -> ArrayTensor:
    scales, _ = search(values, 32, "bf16")
    codes = encode(values, scales, 4)
    scales = round_to(scales * np.float32(factor), scale_dtype)
    stored = (codes * np.repeat(scales, 32, axis=1)).astype(np.float32)
    return ArrayTensor("w", stored, "bf16", codes, scales, Grid(4, 32, scale_dtype, False))


def one(source: ArrayTensor, stored: ArrayTensor) -> TensorComparison:
    return compare({"w": source}, {"w": stored}).tensors[0]


def test_unrounded_products_are_exact() -> None:
    values = lattice()
    source = ArrayTensor("w", values, "bf16")
    stored = on_grid(values)
    assert not np.array_equal(stored.numpy(), values)
    found = one(source, stored)
    assert (found.exact, found.compared, found.max_relative_error) == (512, 512, 0.0)


def test_one_code_off_by_one_is_seen() -> None:
    values = lattice()
    stored = on_grid(values)
    rows = stored.rows(0, 8)
    codes, scales = rows.grid()
    codes[3, 5] += 1 if codes[3, 5] < 7 else -1
    broken = ArrayTensor("w", stored.numpy(), "bf16", codes, scales, stored.grid)
    found = one(ArrayTensor("w", values, "bf16"), broken)
    assert found.exact == 511
    assert found.max_relative_error > 0.05


def test_rounded_scales_are_told_from_requantized_codes() -> None:
    values = lattice()
    source = on_grid(values)
    source = ArrayTensor("w", values, "bf16", *source.rows(0, 8).grid(), source.grid)
    finer = ArrayTensor("w", values, "bf16", source.rows(0, 8).codes, source.rows(0, 8).scales, source.grid)
    assert one(finer, on_grid(values)).scale_rounded
    assert not one(finer, on_grid(values, factor=1.01)).scale_rounded


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_exact(value: float) -> None:
    values = lattice()
    damaged = values.copy()
    damaged[0, 0] = value
    found = one(ArrayTensor("w", values, "bf16"), ArrayTensor("w", damaged, "bf16"))
    assert found.exact == 511
    assert not found.max_relative_error < 1


def test_the_neighbour_in_bf16_is_not_exact() -> None:
    values = lattice()
    damaged = values.copy()
    damaged[2, 2] = np.float32(damaged[2, 2] * (1 + 2.0**-7))
    assert one(ArrayTensor("w", values, "bf16"), ArrayTensor("w", damaged, "bf16")).exact == 511


def test_a_lost_sign_is_seen() -> None:
    values = lattice()
    found = one(ArrayTensor("w", values, "bf16"), ArrayTensor("w", -values, "bf16"))
    assert found.exact == int((values == 0).sum())


def test_missing_and_unexpected_tensors_are_named() -> None:
    a, b = ArrayTensor("a", lattice(), "bf16"), ArrayTensor("b", lattice(), "bf16")
    found = compare({"a": a}, {"b": b})
    assert (found.missing, found.unexpected, found.tensors) == (("a",), ("b",), ())
    transposed = ArrayTensor("a", np.zeros((3, 3), np.float32), "bf16")
    assert compare({"a": a}, {"a": transposed}).missing == ("a",)


def test_equal_values_have_equal_digests() -> None:
    values = lattice()
    source = {"w": ArrayTensor("w", values, "bf16")}
    first, second = compare(source, {"w": on_grid(values)}), compare(source, {"w": on_grid(values, "f32")})
    other = compare(source, source)
    assert first.digest == second.digest != other.digest
