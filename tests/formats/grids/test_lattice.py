"""The lattice search against lattices made by every rule that the field uses for scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemexport.formats.grids.lattice import code_bits, encode, likely_block, search
from gemexport.formats.tensor import ArrayTensor, DType, Floats, expand, narrowest, round_to

RULES = {"max/7": 7.0, "max/8": 8.0, "max/7.5": 7.5}


def on_lattice(
    rule: str, rows: int, width: int, block: int, dtype: DType = "bf16", scale_dtype: DType = "bf16", seed: int = 0
) -> Floats:
    """Random weights `[rows, width]` put on a lattice as quantization-aware training does: w = dtype(s * q)."""
    generator = np.random.Generator(np.random.PCG64(seed))
    blocks = (generator.standard_normal((rows, width // block, block)) * 0.02).astype(np.float32)
    peak = np.abs(blocks).max(axis=-1, keepdims=True)
    scale = peak / RULES.get(rule, 7.5)
    if rule == "least squares":
        for _ in range(3):
            codes = np.clip(np.rint(blocks / scale), -8, 7)
            scale = (blocks * codes).sum(-1, keepdims=True) / np.square(codes).sum(-1, keepdims=True)
    scale = round_to(scale.astype(np.float32), scale_dtype)
    codes = np.clip(np.rint(blocks / scale), -8, 7).astype(np.float32)
    return round_to(codes * scale, dtype).reshape(rows, width)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 384])
@pytest.mark.parametrize("rule", [*RULES, "least squares"])
def test_every_block_is_found_and_reproduced(rule: str, block: int, dtype: DType) -> None:
    values = on_lattice(rule, 96, 384, block, dtype)
    tensor = ArrayTensor("w", values, dtype)
    assert likely_block(tensor) == block
    scales, on = search(values, block, dtype)
    assert on == values.size
    codes = encode(values, scales, 4)
    # float64 holds the products, so this rounds once
    products = codes * expand(scales, block).astype(np.float64)
    assert np.array_equal(round_to(products.astype(np.float32), dtype), values)


@pytest.mark.parametrize("scale_dtype", ["bf16", "f16", "f32"])
def test_scales_come_in_the_narrowest_dtype_that_reproduces(scale_dtype: DType) -> None:
    values = on_lattice("max/7.5", 64, 256, 32, "f32", scale_dtype)
    scales, on = search(values, 32, "f32")
    assert on == values.size
    assert narrowest(scales) == scale_dtype


def test_scales_go_down_to_where_f16_is_subnormal() -> None:
    values = on_lattice("max/7.5", 16, 64, 32) * np.float32(2.0**-12)
    scales, on = search(values, 32, "bf16")
    assert on == values.size
    assert 0 < float(scales.min()) < 2.0**-14


def test_zeros_and_zero_blocks() -> None:
    values = on_lattice("max/7", 4, 64, 32)
    values[1] = 0
    values[2, 32:] = -0.0
    scales, on = search(values, 32, "bf16")
    assert on == values.size
    assert scales[1].tolist() == [0, 0]
    assert scales[2, 1] == 0
    assert not encode(values, scales, 4)[1].any()


def test_blocks_that_reach_neither_end_of_the_codes() -> None:
    codes = np.tile(np.array([3, -5, 1, 0, 2, -1, 4, 5], dtype=np.float32), (2, 4))
    values = round_to(codes * np.float32(0.0173), "bf16")
    scales, on = search(values, 32, "bf16")
    assert on == values.size
    assert np.array_equal(round_to(encode(values, scales, 4) * expand(scales, 32), "bf16"), values)


def test_plain_weights_lie_on_no_lattice() -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    values = round_to(generator.standard_normal((256, 256)).astype(np.float32), "bf16")
    assert likely_block(ArrayTensor("w", values, "bf16")) is None
    scales, on = search(values, 32, "bf16")
    assert on == 0
    assert np.isnan(scales).all()


def test_one_damaged_weight_takes_its_block_off() -> None:
    values = on_lattice("max/7.5", 8, 64, 32)
    values[3, 40] *= np.float32(1 + 2.0**-6)
    scales, on = search(values, 32, "bf16")
    assert on == values.size - 32
    assert np.flatnonzero(np.isnan(scales)).tolist() == [3 * 2 + 1]


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("unit", [0.5, 0.3, 2.0**-20])
def test_what_has_the_code_eight_says_the_sign_of_the_scale(unit: float, dtype: DType) -> None:
    """The code is -8 on one of the two; weights of both signs are eight times a scale on no lattice of 4 bits."""
    codes = np.array([[8, -7, 5, 3, 1, -3, -5, 7] * 4], dtype=np.float32)
    both = codes.copy()
    both[0, 9] = -8
    plus, minus, none = (round_to(each * np.float32(unit), dtype) for each in (codes, -codes, both))
    for values, sign in ((plus, -1), (minus, 1)):
        scales, on = search(values, 32, dtype)
        assert (on, np.sign(scales).item()) == (32, sign)
        found = encode(values, scales, 4)
        assert found.min() == -8
        assert np.array_equal(round_to(found * expand(scales, 32), dtype), values)
    assert search(none, 32, dtype)[1] == 0


@settings(max_examples=60, deadline=None)
@given(
    codes=st.lists(st.integers(-8, 7), min_size=32, max_size=32),
    mantissa=st.integers(128, 255),
    exponent=st.integers(-30, 5),
    sign=st.sampled_from([1, -1]),
)
def test_any_codes_on_any_bf16_scale_are_reproduced(codes: list[int], mantissa: int, exponent: int, sign: int) -> None:
    scale = np.float32(np.ldexp(sign * mantissa, exponent))
    values = round_to(np.array([codes], dtype=np.float32) * scale, "bf16")
    scales, on = search(values, 32, "bf16")
    assert on == 32
    assert np.array_equal(round_to(encode(values, scales, 4) * expand(scales, 32), "bf16"), values)


@pytest.mark.parametrize(("low", "high", "bits"), [(-2, 1, 2), (-8, 7, 4), (-3, 0, 4), (-128, 9, 8)])
def test_width_of_codes(low: int, high: int, bits: int) -> None:
    values = np.array([[low, 0, 0, 0, high, 0, 0, 0], [0] * 8], dtype=np.float32)
    scales = np.array([[0.5, -1.0], [0, 0]], dtype=np.float32)
    assert code_bits(values * np.repeat(abs(scales), 4, axis=1), abs(scales)) == bits
    assert code_bits(values * np.repeat(scales, 4, axis=1), scales) == bits
