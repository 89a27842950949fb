"""Packed weights: what is packed comes back, and lies where ONNX says it does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemexport.formats.onnx import blocks as onnx_blocks
from gemexport.formats.onnx.blocks import PackedTensor, StoredTensor, pack, pack_signed, unpack, unpack_signed
from gemexport.formats.tensor import to_bf16

BITS = (2, 4, 8)


def codes_of(bits: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    half = 1 << (bits - 1)
    return np.random.default_rng(seed).integers(-half, half, shape).astype(np.int8)


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), bytes_a_row=st.integers(1, 9), seed=st.integers(0, 99))
def test_packing_is_undone(bits: int, rows: int, bytes_a_row: int, seed: int) -> None:
    codes = codes_of(bits, (rows, bytes_a_row * 8 // bits), seed)
    for forth, back in ((pack, unpack), (pack_signed, unpack_signed)):
        packed = forth(codes, bits)
        assert packed.shape == (rows, bytes_a_row)
        assert np.array_equal(back(packed, bits), codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_signed_packing_is_the_standards(bits: int) -> None:
    ir = pytest.importorskip("onnx_ir")
    codes = codes_of(bits, (3, 16))
    dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT2
    theirs = ir.Tensor(codes.astype(dtype.numpy()), dtype=dtype).tobytes()
    assert pack_signed(codes, bits).tobytes() == theirs


def test_unsigned_packing_puts_the_first_code_low_and_zero_in_the_middle() -> None:
    assert pack(np.array([-8, 7, 0, 1], np.int8), 4).tolist() == [0xF0, 0x98]
    assert pack(np.array([-2, 1, 0, -1], np.int8), 2).tolist() == [0b01101100]
    assert pack(np.array([-128, 0], np.int8), 8).tolist() == [0, 128]


@given(
    bits=st.sampled_from(BITS),
    transposed=st.booleans(),
    signed=st.booleans(),
    bounds=st.tuples(*[st.integers(0, 16)] * 2),
)
def test_any_slice_of_rows_reads_as_the_whole(
    bits: int, transposed: bool, signed: bool, bounds: tuple[int, int]
) -> None:
    start, stop = sorted(bounds)
    out, width, block = 16, 32, 8
    codes = codes_of(bits, (out, width))
    scales = np.random.default_rng(1).random((out, width // block)).astype(np.float16)
    forth = pack_signed if signed else pack
    packed = forth(np.ascontiguousarray(codes.T) if transposed else codes, bits)
    tensor = PackedTensor("w", packed, scales.T if transposed else scales, bits, signed=signed, transposed=transposed)
    assert tensor.shape == (out, width)
    assert tensor.grid is not None
    assert (tensor.grid.bits, tensor.grid.block, tensor.grid.scale_dtype) == (bits, block, "f16")
    rows = tensor.rows(start, stop)
    assert np.array_equal(rows.grid()[0], codes[start:stop])
    assert np.array_equal(rows.grid()[1], scales[start:stop].astype(np.float32))
    assert np.array_equal(rows.values, (codes * np.repeat(scales.astype(np.float32), block, 1))[start:stop])


def test_zero_points_move_the_codes_and_leave_no_symmetric_grid() -> None:
    codes, scales = codes_of(4, (2, 32)), np.ones((2, 2), np.float32)
    zero_points = np.array([[1, -2], [0, 3]], np.float32)
    tensor = PackedTensor("w", pack(codes, 4), scales, 4, signed=False, transposed=False, zero_points=zero_points)
    assert tensor.grid is not None
    assert tensor.grid.kind == "zero-point"
    assert np.array_equal(tensor.numpy(), codes - np.repeat(zero_points, 16, 1))
    none = PackedTensor("w", pack(codes, 4), scales, 4, signed=False, transposed=False, zero_points=0 * zero_points)
    assert none.grid is not None


@pytest.mark.parametrize("transposed", [False, True])
def test_stored_floats_keep_their_dtype(transposed: bool) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    for array, dtype in ((values, "f32"), (values.astype(np.float16), "f16"), (to_bf16(values), "bf16")):
        tensor = StoredTensor("w", array.T if transposed else array, transposed)
        assert (tensor.shape, tensor.dtype, tensor.grid) == ((3, 4), dtype, None)
        assert np.array_equal(tensor.rows(1, 3).values, values[1:3])
        assert np.array_equal(onnx_blocks.to_floats(array), values)
