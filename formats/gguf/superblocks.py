"""Byte layouts of GGUF's K-quants: 256 weights a block, with a scale and perhaps an offset for each 16 or 32 of them.

Those are small integers, times one f16 number for the whole block: the products are float32 numbers exactly. The
layouts are `block_q2_K` … `block_q6_K` of ggml's ggml-common.h, unpacked as by `dequantize_row_*` of ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.gguf.blocks import BLOCK, WIDE_BLOCK, Bytes, halves, two_bits
from gemexport.formats.tensor import Codes, Floats

NARROW = 16  # weights that share a scale in Q2_K, Q3_K and Q6_K; 32 do in Q4_K and Q5_K


def unpack_q2_k(data: Bytes) -> tuple[Codes, Floats, Floats]:
    """Codes 0…3 `[rows, in]`, scales and biases `[rows, in // 16]` of Q2_K bytes `[rows, in // 256 * 84]`."""
    blocks = _blocks(data, 84)
    factors = blocks[:, :, :16]  # a scale's low, an offset's high half
    codes = two_bits(blocks[:, :, 16:80])
    return _flat(codes), _times(blocks, 80, factors & np.uint8(15)), -_times(blocks, 82, factors >> np.uint8(4))


def unpack_q3_k(data: Bytes) -> tuple[Codes, Floats]:
    """Codes -4…3 `[rows, in]` and scales `[rows, in // 16]` of Q3_K bytes `[rows, in // 256 * 110]`."""
    blocks = _blocks(data, 110)
    low, high = blocks[:, :, 96:104], blocks[:, :, 104:108]
    lower = np.concatenate([low & np.uint8(15), low >> np.uint8(4)], axis=2)
    upper = (high[:, :, None] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & np.uint8(3)).reshape(lower.shape)
    factors = (lower | upper << np.uint8(4)).view(np.int8) - np.int8(32)
    # The mask has a bit where 4 is not taken off: bit k of byte i is of weight 32 * k + i.
    kept = _bits(blocks[:, :, :32])
    codes = (two_bits(blocks[:, :, 32:96]) | kept << np.uint8(2)).view(np.int8) - np.int8(4)
    return _flat(codes), _times(blocks, 108, factors)


def unpack_q4_k(data: Bytes) -> tuple[Codes, Floats, Floats]:
    """Codes 0…15 `[rows, in]`, scales and biases `[rows, in // 32]` of Q4_K bytes `[rows, in // 256 * 144]`."""
    blocks = _blocks(data, 144)
    return _flat(_pairs(blocks[:, :, 16:], BLOCK)), *_six_bits(blocks)


def unpack_q5_k(data: Bytes) -> tuple[Codes, Floats, Floats]:
    """Codes 0…31 `[rows, in]`, scales and biases `[rows, in // 32]` of Q5_K bytes `[rows, in // 256 * 176]`."""
    blocks = _blocks(data, 176)
    fifth = _bits(blocks[:, :, 16:48])
    return _flat(_pairs(blocks[:, :, 48:], BLOCK) | fifth << np.uint8(4)), *_six_bits(blocks)


def unpack_q6_k(data: Bytes) -> tuple[Codes, Floats]:
    """Codes -32…31 `[rows, in]` and scales `[rows, in // 16]` of Q6_K bytes `[rows, in // 256 * 210]`."""
    blocks = _blocks(data, 210)
    low = _pairs(blocks[:, :, :128], 2 * BLOCK).reshape(*blocks.shape[:2], 8, BLOCK)
    codes = (low | two_bits(blocks[:, :, 128:192]) << np.uint8(4)).view(np.int8) - np.int8(32)
    return _flat(codes), _times(blocks, 208, blocks[:, :, 192:208].view(np.int8))


def _blocks(data: Bytes, size: int) -> Bytes:
    """Bytes `[rows, blocks, size]` of rows of blocks."""
    return data.reshape(data.shape[0], -1, size)


def _flat(codes: Codes) -> Codes:
    return codes.reshape(codes.shape[0], -1)


def _times(blocks: Bytes, start: int, factors: NDArray) -> Floats:
    """The f16 number at byte `start` times each small integer `[rows, blocks, n]`: exact, as `[rows, blocks * n]`."""
    products = halves(blocks, start)[:, :, None] * factors.astype(np.float32)
    return products.reshape(blocks.shape[0], -1)


def _pairs(packed: Bytes, span: int) -> NDArray[np.uint8]:
    """Four-bit numbers `[rows, blocks, 8, 32]`: of each `span` bytes the low halves come first, then the high ones."""
    rows, count, size = packed.shape
    parts = packed.reshape(rows, count, size // span, 1, span) >> np.array([[0], [4]], np.uint8) & np.uint8(15)
    return parts.reshape(rows, count, WIDE_BLOCK // BLOCK, BLOCK)


def _bits(packed: Bytes) -> NDArray[np.uint8]:
    """Single bits `[rows, blocks, 8, 32]` of bytes `[rows, blocks, 32]`: bit k of byte i is at `[k, i]`."""
    return packed[:, :, None] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)


def _six_bits(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and biases of Q4_K and Q5_K: d, dmin, then 12 bytes with eight 6-bit factors for each of the two.

    Bytes 0 to 3 have the first four of the scales in their low 6 bits, 4 to 7 of the offsets; the low and high halves
    of bytes 8 to 11 are the low 4 bits of the other four, whose upper 2 are the top of the first eight bytes
    (`get_scale_min_k4`).
    """
    first, second, last = blocks[:, :, 4:8], blocks[:, :, 8:12], blocks[:, :, 12:16]
    top = np.uint8(0x30)
    scales = np.concatenate([first & np.uint8(63), last & np.uint8(15) | first >> np.uint8(2) & top], axis=2)
    offsets = np.concatenate([second & np.uint8(63), last >> np.uint8(4) | second >> np.uint8(2) & top], axis=2)
    return _times(blocks, 0, scales), -_times(blocks, 2, offsets)
