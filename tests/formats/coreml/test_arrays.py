"""Quantized constants against coremltools' own decompression of them, whole and by rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemexport.formats.coreml.arrays import Nonzero, Palette, ShiftScale, Spread, Stored, sparse, spread
from gemexport.formats.coreml.blob import TYPES, Blob, pack

ct = pytest.importorskip("coremltools")

from coremltools.converters.mil.mil.ops.defs.iOS18.compression import (  # noqa: E402
    constexpr_blockwise_shift_scale,
    constexpr_lut_to_dense,
    constexpr_lut_to_sparse,
    constexpr_sparse_blockwise_shift_scale,
    constexpr_sparse_to_dense,
)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4), st.booleans(), st.integers(0, 99)
)
def test_shift_scale(sizes: list[tuple[int, int]], with_offset: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks, shape = tuple(a for a, _ in sizes), tuple(a * b for a, b in sizes)
    data = rng.integers(-8, 8, shape).astype(np.int8)
    scale = rng.normal(size=blocks).astype(np.float32)
    offset = rng.integers(-8, 8, blocks).astype(np.int8) if with_offset else None
    wanted = constexpr_blockwise_shift_scale.decompress(data, scale, offset)
    array = ShiftScale(
        Stored("int4", shape, data),
        Stored("fp32", blocks, scale),
        None if offset is None else Stored("int4", blocks, offset),
    )
    np.testing.assert_allclose(array.numpy(), wanted, rtol=1e-6)
    for start in range(shape[0]):
        np.testing.assert_allclose(array.rows(start, shape[0]), wanted[start:], rtol=1e-6)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3), st.data())
def test_palette(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    vector = data.draw(st.sampled_from([1, 2, 3]))
    axis = data.draw(st.integers(0, len(sizes) - 1)) if vector > 1 else None
    groups, shape = tuple(a for a, _ in sizes), tuple(a * b for a, b in sizes)
    indices = rng.integers(0, 4, shape).astype(np.uint8)
    lut = rng.normal(size=(*groups, 4, vector)).astype(np.float32)
    wanted = constexpr_lut_to_dense.decompress(indices, lut, axis)
    array = Palette(Stored("uint2", shape, indices), Stored("fp32", lut.shape, lut), axis)
    assert array.shape == wanted.shape
    np.testing.assert_array_equal(array.numpy(), wanted)
    for start in range(wanted.shape[0]):
        np.testing.assert_array_equal(array.rows(start, wanted.shape[0]), wanted[start:])


def test_a_palette_of_vectors_says_where_they_lie() -> None:
    lut = Stored("fp16", (1, 1, 2, 2), np.zeros((1, 1, 2, 2), np.float16))
    with pytest.raises(ValueError, match="vector_axis"):
        Palette(Stored("uint1", (2, 2), np.zeros((2, 2), np.uint8)), lut, None)


def test_a_scalar_is_spread() -> None:
    assert spread(Stored("fp16", (), np.array(2, np.float16)), [1, 1]).numpy().tolist() == [[2.0]]
    assert spread(Stored("fp32", (2,), np.array([1, 2], np.float32)), [2, 1]).numpy().tolist() == [[1.0], [2.0]]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 99))
def test_sparse_elements(shape: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, shape).astype(np.uint8)
    nonzero = rng.normal(size=int(mask.sum())).astype(np.float32)
    array = sparse(Stored("fp32", nonzero.shape, nonzero), Stored("uint1", tuple(shape), mask))
    wanted = constexpr_sparse_to_dense.decompress(nonzero, mask)
    np.testing.assert_array_equal(array.numpy(), wanted)
    for start in range(shape[0]):
        np.testing.assert_array_equal(array.rows(start, shape[0]), wanted[start:])


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(0, 1), st.integers(0, 99))
def test_sparse_palettes(size: int, axis: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (4, 6)).astype(np.uint8)
    places = rng.integers(0, 4, int(mask.sum())).astype(np.uint8)
    lut = rng.normal(size=(1, 2, 4, size)).astype(np.float16)
    wanted_mask, values = constexpr_lut_to_sparse.decompress(mask, places, lut, axis if size > 1 else None)
    stored = Stored("uint1", mask.shape, mask)
    dense = Palette(sparse(Stored("uint2", places.shape, places), stored), Stored("fp16", lut.shape, lut), axis)
    wider = Spread(stored, axis, size)
    np.testing.assert_array_equal(wider.numpy(), wanted_mask)
    wanted = constexpr_sparse_to_dense.decompress(values, wanted_mask).astype(np.float32)
    elements = Nonzero(dense, wider)
    assert elements.shape == values.shape
    np.testing.assert_array_equal(elements.numpy(), values.astype(np.float32))
    array = sparse(elements, wider)
    for start in range(wanted.shape[0]):
        np.testing.assert_array_equal(array.rows(start, wanted.shape[0]), wanted[start:])


def test_sparse_codes() -> None:
    rng = np.random.default_rng(5)
    mask = rng.integers(0, 2, (4, 6)).astype(np.uint8)
    codes = rng.integers(-8, 8, int(mask.sum())).astype(np.int8)
    scale, offset = rng.normal(size=(4, 2)).astype(np.float32), rng.integers(-8, 8, (4, 2)).astype(np.int8)
    _, values = constexpr_sparse_blockwise_shift_scale.decompress(mask, codes, scale, offset)
    stored = Stored("uint1", mask.shape, mask)
    data = sparse(Stored("int8", codes.shape, codes), stored)
    dense = ShiftScale(data, Stored("fp32", scale.shape, scale), Stored("int8", offset.shape, offset))
    wanted = constexpr_sparse_to_dense.decompress(values, mask)
    np.testing.assert_allclose(sparse(Nonzero(dense, stored), stored).numpy(), wanted, rtol=1e-6)


@settings(max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 20),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
    st.data(),
)
def test_codes_in_a_file_are_widened_in_one_go(
    rows: int, blocks: int, half: int, signed: bool, with_offset: bool, seed: int, data: st.DataObject
) -> None:
    rng, kind = np.random.default_rng(seed), "int4" if signed else "uint4"
    shape, low = (rows, 2 * blocks * half), -8 if signed else 0
    codes = rng.integers(low, low + 16, shape).astype(np.int8 if signed else np.uint8)
    scale = rng.normal(size=(rows, blocks)).astype(np.float32)
    offset = rng.integers(low, low + 16, scale.shape).astype(codes.dtype) if with_offset else None
    arrays = Stored("fp32", scale.shape, scale), None if offset is None else Stored(kind, scale.shape, offset)
    wanted = ShiftScale(Stored(kind, shape, codes), *arrays).numpy()
    array = ShiftScale(Stored(kind, shape, Blob(TYPES[kind], pack(codes, 4))), *arrays)
    for start in range(rows):
        np.testing.assert_array_equal(array.rows(start, rows).view(np.uint32), wanted[start:].view(np.uint32))
