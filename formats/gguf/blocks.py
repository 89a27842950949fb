"""Byte layouts of GGUF's block types, as pure functions between integer codes with scales and bytes.

The layouts are the structs of ggml's ggml-common.h, `block_q4_0` and so on: some weights in a row share a scale `d` and
perhaps an offset `m`, both f16. The K-quants, whose blocks have blocks inside, are in `gguf_superblocks`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.tensor import Codes, Floats

BLOCK = 32
WIDE_BLOCK = 256  # weights of a TQ2_0 block and of the K-quants'
Q4_0_BYTES = 2 + BLOCK // 2
Q4_1_BYTES = 4 + BLOCK // 2
Q5_0_BYTES = 2 + BLOCK // 8 + BLOCK // 2
Q5_1_BYTES = 4 + BLOCK // 8 + BLOCK // 2
Q8_0_BYTES = 2 + BLOCK
TQ2_0_BYTES = WIDE_BLOCK // 4 + 2
MXFP4_BYTES = 1 + BLOCK // 2

# FP4 of the OCP Microscaling specification 1.0, by code: a sign, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

Bytes = NDArray[np.uint8]
Halves = NDArray[np.float16]


def half(scales: Floats) -> Halves | None:
    """Scales as f16 when every one of them is an f16 number, else None."""
    with np.errstate(over="ignore"):
        narrow = scales.astype("<f2")
    return narrow if np.array_equal(narrow.astype(np.float32), scales) else None


def pack_q4_0(codes: Codes, scales: Halves) -> Bytes:
    """Q4_0 bytes `[rows, in // 32 * 18]` of codes -8…7 `[rows, in]` and scales `[rows, in // 32]`: d, codes + 8."""
    rows, width = codes.shape
    out = np.empty((rows, width // BLOCK, Q4_0_BYTES), np.uint8)
    out[:, :, :2] = _scale_bytes(scales)
    _join_nibbles(codes.view(np.uint8) + np.uint8(8), out[:, :, 2:])
    return out.reshape(rows, -1)


def unpack_q4_0(data: Bytes) -> tuple[Codes, Floats]:
    """Codes `[rows, in]` and scales `[rows, in // 32]` of Q4_0 bytes `[rows, in // 32 * 18]`."""
    blocks = data.reshape(data.shape[0], -1, Q4_0_BYTES)
    codes = _nibbles(blocks[:, :, 2:])
    codes -= np.uint8(8)
    return codes.view(np.int8), halves(blocks)


def pack_q4_1(codes: Codes, scales: Halves, biases: Halves) -> Bytes:
    """Q4_1 bytes `[rows, in // 32 * 20]` of codes 0…15, scales and biases: d, m, codes; a weight is d * code + m."""
    rows, width = codes.shape
    out = np.empty((rows, width // BLOCK, Q4_1_BYTES), np.uint8)
    out[:, :, :2] = _scale_bytes(scales)
    out[:, :, 2:4] = _scale_bytes(biases)
    _join_nibbles(codes.view(np.uint8), out[:, :, 4:])
    return out.reshape(rows, -1)


def unpack_q4_1(data: Bytes) -> tuple[Codes, Floats, Floats]:
    """Codes `[rows, in]`, scales and biases `[rows, in // 32]` of Q4_1 bytes `[rows, in // 32 * 20]`."""
    blocks = data.reshape(data.shape[0], -1, Q4_1_BYTES)
    return _nibbles(blocks[:, :, 4:]), halves(blocks), halves(blocks, 2)


def pack_q5_0(codes: Codes, scales: Halves) -> Bytes:
    """Q5_0 bytes `[rows, in // 32 * 22]` of codes -16…15 and scales: d, the fifth bits of codes + 16, the low four."""
    rows, width = codes.shape
    out = np.empty((rows, width // BLOCK, Q5_0_BYTES), np.uint8)
    out[:, :, :2] = _scale_bytes(scales)
    _join_five(codes.view(np.uint8) + np.uint8(16), out[:, :, 2:])
    return out.reshape(rows, -1)


def unpack_q5_0(data: Bytes) -> tuple[Codes, Floats]:
    """Codes `[rows, in]` and scales `[rows, in // 32]` of Q5_0 bytes `[rows, in // 32 * 22]`."""
    blocks = data.reshape(data.shape[0], -1, Q5_0_BYTES)
    codes = _five(blocks[:, :, 2:])
    codes -= np.uint8(16)
    return codes.view(np.int8), halves(blocks)


def pack_q5_1(codes: Codes, scales: Halves, biases: Halves) -> Bytes:
    """Q5_1 bytes `[rows, in // 32 * 24]` of codes 0…31, scales and biases: d, m, the fifth bits, the low four."""
    rows, width = codes.shape
    out = np.empty((rows, width // BLOCK, Q5_1_BYTES), np.uint8)
    out[:, :, :2] = _scale_bytes(scales)
    out[:, :, 2:4] = _scale_bytes(biases)
    _join_five(codes.view(np.uint8), out[:, :, 4:])
    return out.reshape(rows, -1)


def unpack_q5_1(data: Bytes) -> tuple[Codes, Floats, Floats]:
    """Codes `[rows, in]`, scales and biases `[rows, in // 32]` of Q5_1 bytes `[rows, in // 32 * 24]`."""
    blocks = data.reshape(data.shape[0], -1, Q5_1_BYTES)
    return _five(blocks[:, :, 4:]), halves(blocks), halves(blocks, 2)


def pack_q8_0(codes: Codes, scales: Halves) -> Bytes:
    """Q8_0 bytes `[rows, in // 32 * 34]` of codes -128…127 `[rows, in]` and scales `[rows, in // 32]`: d, codes."""
    rows, width = codes.shape
    out = np.empty((rows, width // BLOCK, Q8_0_BYTES), np.uint8)
    out[:, :, :2] = _scale_bytes(scales)
    out[:, :, 2:] = codes.view(np.uint8).reshape(rows, width // BLOCK, BLOCK)
    return out.reshape(rows, -1)


def unpack_q8_0(data: Bytes) -> tuple[Codes, Floats]:
    """Codes `[rows, in]` and scales `[rows, in // 32]` of Q8_0 bytes `[rows, in // 32 * 34]`."""
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, Q8_0_BYTES)
    return blocks[:, :, 2:].reshape(rows, -1).view(np.int8), halves(blocks)


def pack_tq2_0(codes: Codes, scales: Halves) -> Bytes:
    """TQ2_0 bytes `[rows, in // 256 * 66]` of codes -2…1 `[rows, in]` and scales `[rows, in // 256]`.

    The type means (c - 1) * d with c in 0…3. A code q on a scale s is the same with c = 1 - q and d = -s: so -2 has a
    place, for which c = q + 1 has none. In each half of a block, byte i holds weights i, i + 32, i + 64 and i + 96.
    """
    rows, width = codes.shape
    out = np.empty((rows, width // WIDE_BLOCK, TQ2_0_BYTES), np.uint8)
    out[:, :, -2:] = _scale_bytes(-scales)
    parts = (np.uint8(1) - codes.view(np.uint8)).reshape(rows, -1, 2, 4, BLOCK)
    joined = parts[..., 0, :] | parts[..., 1, :] << 2 | parts[..., 2, :] << 4 | parts[..., 3, :] << 6
    out[:, :, :-2] = joined.reshape(rows, -1, TQ2_0_BYTES - 2)
    return out.reshape(rows, -1)


def unpack_tq2_0(data: Bytes) -> tuple[Codes, Floats]:
    """Codes `[rows, in]` and scales `[rows, in // 256]` of TQ2_0 bytes `[rows, in // 256 * 66]`; see `pack_tq2_0`."""
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, TQ2_0_BYTES)
    codes = np.uint8(1) - two_bits(blocks[:, :, :-2]).reshape(rows, -1)
    return codes.view(np.int8), -halves(blocks, TQ2_0_BYTES - 2)


def pack_mxfp4(codes: Codes, exponents: Bytes) -> Bytes:
    """MXFP4 bytes `[rows, in // 32 * 17]` of codes of E2M1 `[rows, in]` and exponents of `power_of_two`."""
    rows, width = codes.shape
    out = np.empty((rows, width // BLOCK, MXFP4_BYTES), np.uint8)
    out[:, :, 0] = exponents
    _join_nibbles(codes.view(np.uint8), out[:, :, 1:])
    return out.reshape(rows, -1)


def unpack_mxfp4(data: Bytes) -> tuple[Codes, Floats]:
    """Codes `[rows, in]` and scales 2 ** (e - 127) `[rows, in // 32]` of MXFP4 bytes; e = 255 is infinite here."""
    blocks = data.reshape(data.shape[0], -1, MXFP4_BYTES)
    exponents = blocks[:, :, 0].astype(np.uint32)
    # float32 has the same exponents, but for its subnormal numbers: 2 ** -127 is the upper one of their 23 bits.
    bits = np.where(exponents == 0, np.uint32(1 << 22), exponents << np.uint32(23))
    return _nibbles(blocks[:, :, 1:]), bits.view(np.float32)


def power_of_two(scales: Floats) -> Bytes | None:
    """The e of scales 2 ** (e - 127); None when one of them is no such number (zero is none)."""
    mantissas, exponents = np.frexp(scales)
    stored = exponents + 126
    fits = (mantissas == 0.5) & (stored >= 0) & (stored < 255)
    return stored.astype(np.uint8) if fits.all() else None


def quantize_q8_0(values: Floats) -> Bytes:
    """Q8_0 bytes of plain values `[rows, in]`, the same as ggml's `quantize_row_q8_0_ref`.

    d = largest magnitude / 127, and codes are rounded half away from zero against d before it becomes f16.
    """
    rows, width = values.shape
    blocks = values.reshape(rows, width // BLOCK, BLOCK)
    scales = np.abs(blocks).max(axis=2) / np.float32(127)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    scaled = blocks * inverse[:, :, None]
    codes = np.trunc(scaled)
    codes += np.trunc(2 * (scaled - codes))
    with np.errstate(over="ignore"):
        return pack_q8_0(codes.astype(np.int8).reshape(rows, width), scales.astype("<f2"))


def _nibbles(packed: Bytes) -> NDArray[np.uint8]:
    """Four-bit numbers `[rows, in]` of bytes `[rows, blocks, 16]`: byte i has weight i low and weight i + 16 high."""
    rows = packed.shape[0]
    # A block's bytes are moved as one element of 16 bytes: NumPy's loops over so few of them take ten times as long.
    moved = np.ascontiguousarray(packed.view("V16")).view(np.uint8)
    out = np.empty((*packed.shape[:2], 2), "V16")
    out[:, :, :1] = (moved & np.uint8(15)).view("V16")
    out[:, :, 1:] = (moved >> np.uint8(4)).view("V16")
    return out.view(np.uint8).reshape(rows, -1)


def _join_nibbles(numbers: NDArray[np.uint8], out: Bytes) -> None:
    """The opposite of `_nibbles`, into the view `out` `[rows, blocks, 16]`."""
    halves = numbers.reshape(*out.shape[:2], 2, BLOCK // 2)
    np.bitwise_or(halves[:, :, 0], halves[:, :, 1] << np.uint8(4), out=out)


def _five(packed: Bytes) -> NDArray[np.uint8]:
    """Five-bit numbers `[rows, in]`: 32 fifth bits from the lowest on, then the low four as `_nibbles`."""
    rows = packed.shape[0]
    numbers = _nibbles(packed[:, :, BLOCK // 8 :])
    numbers |= np.unpackbits(packed[:, :, : BLOCK // 8], axis=2, bitorder="little").reshape(rows, -1) << np.uint8(4)
    return numbers


def _join_five(numbers: NDArray[np.uint8], out: Bytes) -> None:
    """The opposite of `_five`, into the view `out` `[rows, blocks, 20]`."""
    fifth = numbers.reshape(*out.shape[:2], BLOCK) >> np.uint8(4)
    out[:, :, : BLOCK // 8] = np.packbits(fifth, axis=2, bitorder="little")
    _join_nibbles(numbers & np.uint8(15), out[:, :, BLOCK // 8 :])


def two_bits(packed: Bytes) -> NDArray[np.uint8]:
    """Two-bit numbers `[rows, blocks, 8, 32]` out of `[rows, blocks, 64]`: byte i of each half holds four, 32 apart."""
    rows, count, _ = packed.shape
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    parts = packed.reshape(rows, count, 2, 1, BLOCK) >> shifts & np.uint8(3)
    return parts.reshape(rows, count, 8, BLOCK)


def _scale_bytes(scales: Halves) -> Bytes:
    return np.ascontiguousarray(scales, dtype="<f2").view(np.uint8).reshape(*scales.shape, 2)


def halves(blocks: Bytes, start: int = 0) -> Floats:
    """The f16 number at byte `start` of each block of bytes `[rows, blocks, bytes]`, as float32 `[rows, blocks]`."""
    return blocks[:, :, start : start + 2].view("<f2")[:, :, 0].astype(np.float32)
