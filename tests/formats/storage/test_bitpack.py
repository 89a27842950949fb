"""The packed layout is MLX's and compressed-tensors' own, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemexport.formats.storage.bitpack import pack, signed, unpack, words, zero_code


def _codes(rows: int, width: int, bits: int, seed: int = 0) -> np.ndarray:
    low = -zero_code(bits)
    return np.random.default_rng(seed).integers(low, -low, (rows, width)).astype(np.int8)


BITS = st.integers(1, 8)


@given(st.integers(1, 9), st.integers(1, 150), BITS, st.booleans(), st.integers(0, 1000))
def test_unpack_undoes_pack(rows: int, width: int, bits: int, unsigned: bool, seed: int) -> None:
    codes = _codes(rows, width, bits, seed)
    given_codes = (codes.astype(int) + zero_code(bits)).astype(np.uint8) if unsigned else codes
    packed = pack(given_codes, bits)
    assert packed.shape == (rows, words(width, bits))
    np.testing.assert_array_equal(signed(unpack(packed, bits, width), bits), codes)
    np.testing.assert_array_equal(unpack(packed.view(np.uint8), bits, width), unpack(packed, bits, width))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("width", [8, 32, 36, 41, 96])
def test_compressed_tensors_packs_the_same_bits(bits: int, width: int) -> None:
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = _codes(5, width, bits)
    theirs = helpers.pack_to_int32(torch.from_numpy(codes), bits).numpy()
    np.testing.assert_array_equal(pack(codes, bits).view("<i4"), theirs)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_compressed_tensors_of_any_width_is_read(bits: int) -> None:
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = _codes(4, 53, bits)
    packed = helpers.pack_to_int32(torch.from_numpy(codes), bits).numpy().view("<u4")
    np.testing.assert_array_equal(signed(unpack(packed, bits, 53), bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_packs_the_same_bits(bits: int) -> None:
    mx = pytest.importorskip("mlx.core")
    ones = mx.ones((6, 2), dtype=mx.float32)
    weights = mx.array(np.random.default_rng(1).standard_normal((6, 128)).astype(np.float32))
    packed, scales, biases = mx.quantize(weights, group_size=64, bits=bits)
    codes = mx.dequantize(packed, ones, ones * 0, group_size=64, bits=bits)
    unsigned = unpack(np.array(packed), bits, 128)
    np.testing.assert_array_equal(unsigned, np.array(codes).astype(np.uint8))
    assert np.array(scales).shape == np.array(biases).shape == (6, 2)
    np.testing.assert_array_equal(pack(signed(unsigned, bits), bits), np.array(packed))
