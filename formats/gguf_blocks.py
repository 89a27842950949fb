"""Byte layouts of GGUF's block types, as pure functions between integer codes with scales and bytes.

The layouts are `block_q4_0` and `block_q8_0` of ggml's ggml-common.h. 32 consecutive weights share one f16 scale `d`:
Q4_0 is d, then 16 bytes of which byte i holds code i + 8 in the low and code i + 16 + 8 in the high half; Q8_0 is d,
then 32 signed bytes.
"""

from __future__ import annotations

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from gemexport.formats.tensor import Codes, Floats

BLOCK = 32
Q4_0_BYTES = 2 + BLOCK // 2
Q8_0_BYTES = 2 + BLOCK

Bytes = NDArray[np.uint8]


def half(scales: Floats) -> NDArray[np.float16] | None:
    """Scales as f16 when every one of them is an f16 number, else None."""
    with np.errstate(over="ignore"):
        narrow = scales.astype("<f2")
    return narrow if np.array_equal(narrow.astype(np.float32), scales) else None


def pack_q4_0(codes: Codes, scales: NDArray[np.float16]) -> Bytes:
    """Q4_0 bytes `[rows, in // 32 * 18]` of codes -8…7 `[rows, in]` and scales `[rows, in // 32]`."""
    rows, width = codes.shape
    out = np.empty((rows, width // BLOCK, Q4_0_BYTES), np.uint8)
    out[:, :, :2] = _scale_bytes(scales)
    halves = (codes.view(np.uint8) + np.uint8(8)).reshape(rows, width // BLOCK, 2, BLOCK // 2)
    np.bitwise_or(halves[:, :, 0], halves[:, :, 1] << np.uint8(4), out=out[:, :, 2:])
    return out.reshape(rows, -1)


def unpack_q4_0(data: Bytes) -> tuple[Codes, Floats]:
    """Codes `[rows, in]` and scales `[rows, in // 32]` of Q4_0 bytes `[rows, in // 32 * 18]`."""
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, Q4_0_BYTES)
    codes = np.empty((rows, blocks.shape[1], 2, BLOCK // 2), np.uint8)
    np.bitwise_and(blocks[:, :, 2:], np.uint8(15), out=codes[:, :, 0])
    np.right_shift(blocks[:, :, 2:], np.uint8(4), out=codes[:, :, 1])
    codes -= np.uint8(8)
    return codes.view(np.int8).reshape(rows, -1), _scales(blocks)


def pack_q8_0(codes: Codes, scales: NDArray[np.float16]) -> Bytes:
    """Q8_0 bytes `[rows, in // 32 * 34]` of codes -128…127 `[rows, in]` and scales `[rows, in // 32]`."""
    rows, width = codes.shape
    out = np.empty((rows, width // BLOCK, Q8_0_BYTES), np.uint8)
    out[:, :, :2] = _scale_bytes(scales)
    out[:, :, 2:] = codes.view(np.uint8).reshape(rows, width // BLOCK, BLOCK)
    return out.reshape(rows, -1)


def unpack_q8_0(data: Bytes) -> tuple[Codes, Floats]:
    """Codes `[rows, in]` and scales `[rows, in // 32]` of Q8_0 bytes `[rows, in // 32 * 34]`."""
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, Q8_0_BYTES)
    return blocks[:, :, 2:].reshape(rows, -1).view(np.int8), _scales(blocks)


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


def _scale_bytes(scales: NDArray[np.float16]) -> Bytes:
    return np.ascontiguousarray(scales, dtype="<f2").view(np.uint8).reshape(*scales.shape, 2)


def _scales(blocks: Bytes) -> Floats:
    bits = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")
    return bits[:, :, 0].astype(np.float32)


UNPACK = {GGMLQuantizationType.Q4_0: unpack_q4_0, GGMLQuantizationType.Q8_0: unpack_q8_0}
"""Types whose blocks are a symmetric grid: bytes in, codes and scales out."""

BITS = {GGMLQuantizationType.Q4_0: 4, GGMLQuantizationType.Q8_0: 8}
