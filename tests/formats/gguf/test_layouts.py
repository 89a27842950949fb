"""GGUF's block types as grids: against gguf-py's own quantizers, byte for byte and value for value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import quants as reference
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from gemexport.formats import gguf
from gemexport.formats.gguf import blocks
from gemexport.formats.gguf.container import Writer, string, uint32
from gemexport.formats.gguf.layouts import LAYOUTS

shapes = st.tuples(st.integers(1, 4), st.integers(1, 3))
seeds = st.integers(0, 2**32 - 1)
# Where a block has f16 numbers: random bytes there would be NaN and infinite now and then.
HALVES = {
    Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q5_0: (0,), Type.Q5_1: (0, 2), Type.Q8_0: (0,), Type.TQ2_0: (64,),
    Type.MXFP4: (), Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,),
}  # fmt: skip
CODES = {"symmetric": np.int8, "affine": np.uint8, "codebook": np.uint8}


def random_blocks(kind: Type, rows: int, count: int, seed: int) -> np.ndarray:
    """Bytes `[rows, bytes]` of any codes and factors, with f16 numbers of ordinary size."""
    stream = np.random.default_rng(seed)
    data = stream.integers(0, 256, (rows, count, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for place in HALVES[kind]:
        numbers = stream.standard_normal((rows, count)).astype("<f2")
        data[:, :, place : place + 2] = numbers.view(np.uint8).reshape(rows, count, 2)
    if kind == Type.MXFP4:
        data[:, :, 0] = np.minimum(data[:, :, 0], 250)  # with 6 * 2 ** 124 float32 ends
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", LAYOUTS)
@given(shapes, seeds)
@settings(max_examples=25, deadline=None)
def test_any_block_means_what_gguf_reads(kind: Type, shape: tuple[int, int], seed: int) -> None:
    data, layout = random_blocks(kind, *shape, seed), LAYOUTS[kind]
    rows = layout.rows(data)
    expected = reference.dequantize(data, kind)
    assert np.array_equal(rows.values, expected)
    assert rows.codes is not None
    assert rows.scales is not None
    assert rows.codes.dtype == CODES[layout.grid.kind]
    assert rows.codes.shape == expected.shape
    assert rows.scales.shape == (shape[0], expected.shape[1] // layout.grid.block)
    assert (rows.shifts is not None) == (layout.grid.kind == "affine")
    low = -(1 << layout.grid.bits - 1) if layout.grid.kind == "symmetric" else 0
    assert rows.codes.min() >= low
    assert rows.codes.max() < low + (1 << layout.grid.bits)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.TQ2_0, Type.MXFP4])
@given(shapes, seeds)
@settings(max_examples=15, deadline=None)
def test_what_gguf_quantized_is_packed_to_the_same_bytes(kind: Type, shape: tuple[int, int], seed: int) -> None:
    """gguf-py's quantizer makes the bytes; unpacked and packed again they are the same."""
    width = shape[1] * GGML_QUANT_SIZES[kind][0]
    values = np.random.default_rng(seed).standard_normal((shape[0], width)).astype(np.float32)
    data = reference.quantize(values, kind)
    rows = LAYOUTS[kind].rows(data)
    numbers = [rows.scales] if rows.shifts is None else [rows.scales, rows.shifts]
    if kind == Type.MXFP4:
        packed = blocks.pack_mxfp4(rows.codes, blocks.power_of_two(rows.scales))
    else:
        pack = getattr(blocks, f"pack_{kind.name.lower()}")
        packed = pack(rows.codes, *(part.astype("<f2") for part in numbers))
    assert np.array_equal(packed, data)


@given(shapes, seeds)
@settings(max_examples=15, deadline=None)
def test_every_two_bit_code_has_a_place_in_tq2_0(shape: tuple[int, int], seed: int) -> None:
    """-2 as well, which a ternary model does not have: the scale's sign is turned."""
    stream = np.random.default_rng(seed)
    codes = stream.integers(-2, 2, (shape[0], shape[1] * 256)).astype(np.int8)
    scales = stream.standard_normal(shape).astype(np.float16)
    data = blocks.pack_tq2_0(codes, scales)
    found_codes, found_scales = blocks.unpack_tq2_0(data)
    assert np.array_equal(found_codes, codes)
    assert np.array_equal(found_scales, scales.astype(np.float32))
    expected = codes * np.repeat(scales.astype(np.float32), 256, axis=1)
    assert np.array_equal(reference.dequantize(data, Type.TQ2_0), expected)


@pytest.mark.parametrize("exponent", [0, 1, 2, 127, 253, 254])
def test_powers_of_two_are_stored_as_exponents(exponent: int) -> None:
    scale = np.float32(2.0) ** np.float32(exponent - 127)
    stored = blocks.power_of_two(np.array([[scale]], np.float32))
    assert stored is not None
    assert stored.tolist() == [[exponent]]
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    _, scales = blocks.unpack_mxfp4(blocks.pack_mxfp4(codes, stored))
    assert scales.tolist() == [[scale]]


@pytest.mark.parametrize("scale", [0.0, -1.0, 0.75, 2.0**-128, np.inf, np.nan])
def test_no_other_scale_is_taken_for_one(scale: float) -> None:
    assert blocks.power_of_two(np.array([[1.0, scale]], np.float32)) is None


# What gguf-py can evaluate and has no grid; Q8_1, Q8_K and integers are no types of weights.
PLAIN = ("TQ1_0", "NVFP4", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")


@pytest.mark.parametrize("name", PLAIN)
def test_other_types_are_plain_numbers(name: str, tmp_path: Path) -> None:
    kind = Type[name]
    block, size = GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(3).integers(0, 64, (4, 2 * size), dtype=np.uint8)  # below 64: no NaN of any layout
    path = tmp_path / "plain.gguf"
    metadata = {"general.architecture": string("gemma3"), "gemma3.block_count": uint32(1)}
    with Writer(path, metadata, {"token_embd.weight": (4, 2 * block)}) as out:
        out.write("token_embd.weight", kind, data)
    tensor = gguf.tensors(path)["model.embed_tokens.weight"]
    assert tensor.grid is None
    assert np.array_equal(tensor.rows(1, 3).values, reference.dequantize(data, kind)[1:3])
    assert np.abs(tensor.numpy()).max() > 0
