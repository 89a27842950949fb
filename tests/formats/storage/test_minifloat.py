"""Levels and scales of small floats are those of the libraries that write them."""

from __future__ import annotations

import numpy as np
import pytest

from gemexport.formats.storage.minifloat import (
    E2M1,
    E2M3,
    E4M3,
    E4M3_NAN,
    from_e4m3,
    from_e8m0,
    is_nan_e4m3,
    multiple,
    to_e4m3,
    to_e8m0,
)

BYTES = np.arange(256, dtype=np.uint8)
NUMBERS = BYTES[(BYTES & 0x7F) != E4M3_NAN]


def test_levels_are_those_of_torch_and_compressed_tensors() -> None:
    torch = pytest.importorskip("torch")
    four = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers").kE2M1ToFloat.tolist()
    six = pytest.importorskip("compressed_tensors.compressors.mxfp6.helpers").kE2M3ToFloat.tolist()
    assert list(E2M1) == four + [-level for level in four]
    assert list(E2M3) == six + [-level for level in six]
    eight = torch.from_numpy(BYTES.copy()).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(from_e4m3(BYTES), eight)
    np.testing.assert_array_equal(np.array(E4M3, np.float32)[NUMBERS], eight[NUMBERS])
    assert not is_nan_e4m3(NUMBERS)
    assert is_nan_e4m3(BYTES)


def test_e4m3_bytes_come_back_or_are_refused() -> None:
    back = to_e4m3(from_e4m3(NUMBERS))
    assert back is not None
    np.testing.assert_array_equal(back, np.where(NUMBERS == 0x80, 0, NUMBERS))  # -0 is 0
    for value in (1.0625, 1e-4, 480.0, np.nan, np.inf):
        assert to_e4m3(np.array([1.0, value], np.float32)) is None


def test_e8m0_bytes_come_back_or_are_refused() -> None:
    powers = from_e8m0(BYTES[:-1])
    np.testing.assert_array_equal(powers, 2.0 ** (np.arange(255.0) - 127))
    back = to_e8m0(powers)
    assert back is not None
    np.testing.assert_array_equal(back, BYTES[:-1])
    assert np.isnan(from_e8m0(BYTES[-1:])).all()
    for value in (3.0, 0.0, -1.0, np.nan, np.inf, 2.0**-128):
        assert to_e8m0(np.array([1.0, value], np.float32)) is None


def test_levels_may_be_scaled() -> None:
    assert multiple(E2M1, E2M1) == 1.0
    assert multiple(tuple(2 * level for level in E2M1), E2M1) == 2.0  # as llama.cpp writes them down
    assert multiple((*E2M1[:-1], -5.0), E2M1) is None
    assert multiple(E2M3, E2M1) is None
