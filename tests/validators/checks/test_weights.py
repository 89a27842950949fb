"""The weights validator counts what is exact, and is fooled by nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gemexport.formats.grids.lattice import encode, search
from gemexport.formats.tensor import ArrayTensor, DType, Floats, Grid, Kind, evaluate, round_to
from gemexport.validators.checks.weights import TensorComparison, compare


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


def test_a_tensor_of_as_many_weights_in_another_shape_is_missing() -> None:
    values = lattice()
    turned, stacked = ArrayTensor("a", values.T, "bf16"), ArrayTensor("a", values.reshape(2, 4, 64), "bf16")
    for stored, shape in ((turned, "[64, 8]"), (stacked, "[2, 4, 64]")):
        found = compare({"a": ArrayTensor("a", values, "bf16")}, {"a": stored})
        assert found.missing == (f"a (has the shape {shape}, not [8, 64])",)
        assert (found.unexpected, found.tensors) == ((), ())


def test_equal_values_have_equal_digests() -> None:
    values = lattice()
    source = {"w": ArrayTensor("w", values, "bf16")}
    first, second = compare(source, {"w": on_grid(values)}), compare(source, {"w": on_grid(values, "f32")})
    other = compare(source, source)
    assert first.digest == second.digest != other.digest


def nearest(numbers: NDArray[np.float64], dtype: DType) -> NDArray[np.float64]:
    """Normal numbers rounded once, ties to even."""
    if dtype != "bf16":
        return numbers.astype(np.float16 if dtype == "f16" else np.float32).astype(np.float64)
    mantissas, exponents = np.frexp(numbers)
    return np.ldexp(np.rint(mantissas * 256), exponents - 8)


@given(
    dtype=st.sampled_from(["bf16", "f16", "f32"]),
    wanted=st.floats(2.0**-10, 8.0, width=32),
    place=st.sampled_from([0.0, 0.5, 0.5, 1.0]),  # of the step to the next value
    steps=st.integers(-1, 1),  # of the scale's last bit
    size=st.one_of(st.sampled_from([1, 2, 64]), st.integers(1, 127)),
    sign=st.sampled_from([1, -1]),
)
@settings(max_examples=400)
@example("bf16", 1 + 2.0**-7, 0.5, 0, 1, 1)  # a tie that goes to the even neighbour
@example("bf16", 1 + 2.0**-6, 0.5, 0, 1, -1)
@example("bf16", 1.0, 0.5, 0, 3, 1)  # beside a tie by less than float32 can tell
@example("f16", 1 + 2.0**-10, 0.5, 0, 3, 1)
def test_exact_is_what_rounds_to_the_source(
    dtype: DType, wanted: float, place: float, steps: int, size: int, sign: int
) -> None:
    """At ties and beside them, where rounding twice would go wrong."""
    here = nearest(np.array([[wanted]]), dtype)
    after = nearest(here * (1 + {"bf16": 2.0**-7, "f16": 2.0**-10, "f32": 2.0**-23}[dtype]), dtype)
    scales = ((here + (after - here) * place) / size).astype(np.float32)
    scales = (scales.view(np.int32) + np.int32(steps)).view(np.float32)
    codes, values = np.array([[sign * size]], np.int8), (sign * here).astype(np.float32)
    expected = nearest(codes * scales.astype(np.float64), dtype) == values
    stored = ArrayTensor("w", values, "f32", codes, scales, Grid(8, 1, "f32", True))
    assert one(ArrayTensor("w", values, dtype), stored).exact == int(expected[0, 0])


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zero_is_exact_whatever_its_sign_and_nothing_else_is_zero(value: float) -> None:
    zeros = ArrayTensor("w", np.full((2, 3), value, np.float32), "bf16")
    assert one(zeros, ArrayTensor("w", -zeros.numpy(), "f32")).exact == 6
    assert one(zeros, ArrayTensor("w", zeros.numpy() + np.float32(1e-44), "f32")).exact == 0


def test_the_sign_of_a_zero_is_no_other_number() -> None:
    values = lattice()
    digests = {compare({"w": on_grid(values)}, {"w": ArrayTensor("w", v, "f32")}).digest for v in (values, values + 0)}
    assert len(digests) == 1


@pytest.mark.parametrize("kind", ["symmetric", "zero-point", "affine", "codebook"])
@pytest.mark.parametrize("block", [16, 48, 720])
def test_every_kind_of_grid_is_evaluated_as_written(kind: Kind, block: int) -> None:
    """Blocks end within the pieces that are judged at once, and pieces within blocks."""
    generator = np.random.Generator(np.random.PCG64(1))
    codes = generator.integers(0, 16, (5, 720)).astype(np.uint8)
    scales = generator.uniform(-0.02, 0.02, (5, 720 // block)).astype(np.float32)
    shifts = None if kind in ("symmetric", "codebook") else generator.integers(0, 16, scales.shape).astype(np.float32)
    if kind == "symmetric":
        codes = (codes - np.uint8(8)).view(np.int8)
    grid = Grid(4, block, "f32", True, kind, tuple(np.linspace(-1, 1, 16).tolist()) if kind == "codebook" else ())
    found = evaluate(grid, codes, scales, shifts)
    wanted = round_to((found * (1 + generator.choice([0, 2.0**-6], found.shape))).astype(np.float32), "bf16")
    stored = ArrayTensor("w", found.astype(np.float32), "f32", codes, scales, grid, shifts)
    judged = compare({"w": ArrayTensor("w", wanted, "bf16")}, {"w": stored})
    exact = nearest(found, "bf16") == wanted
    error = np.where(exact, 0, np.abs(found - wanted))
    assert 0 < judged.tensors[0].exact == exact.sum() < exact.size
    assert judged.tensors[0].max_relative_error == error.max() / np.abs(wanted).max()
    rms = np.sqrt(np.square(error).sum() / np.square(wanted, dtype=np.float64).sum())
    assert judged.tensors[0].rms_relative_error == pytest.approx(rms, rel=1e-12)
    plain = ArrayTensor("w", found.astype(np.float32), "f32")
    assert judged.digest == compare({"w": plain}, {"w": plain}).digest


def test_scales_of_unlike_blocks_are_compared_by_the_weight() -> None:
    values = lattice()
    rows = on_grid(values).rows(0, 8)
    codes, scales = rows.grid()
    source = ArrayTensor("w", values, "bf16", codes, scales, Grid(4, 32, "bf16", True))
    finer = ArrayTensor("w", values, "bf16", codes, np.repeat(scales, 2, axis=1), Grid(4, 16, "bf16", True))
    assert one(source, finer).scale_rounded
    assert one(source, finer).same_scales is None
    other = np.repeat(scales, 2, axis=1)
    other[3, 1] *= 2
    assert not one(source, ArrayTensor("w", values, "bf16", codes, other, finer.grid)).scale_rounded
