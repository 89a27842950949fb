"""Integer codes as a dense stream of bits, the lowest first, row by row: the layout of MLX and compressed-tensors.

Both store an unsigned code, q + 2**(bits - 1) for the signed q, and pad a row with zero bits to whole 32-bit words
(mlx.core.quantize; compressed_tensors.compressors.pack_quantized.helpers). For 4 bits the low nibble comes first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.tensor import Codes

Words = NDArray[np.uint32]
Unsigned = NDArray[np.uint8]


def zero_code(bits: int) -> int:
    """The unsigned code that stands for the signed 0."""
    return int(1 << (bits - 1))


def words(width: int, bits: int) -> int:
    """How many 32-bit words a row of `width` codes takes."""
    return -(-width * bits // 32)


def pack(codes: Codes, bits: int) -> Words:
    """Signed codes `[rows, in]` of 2, 4 or 8 bits as words `[rows, words(in, bits)]`."""
    row = words(codes.shape[1], bits) * 32 // bits
    if row != codes.shape[1]:
        # The padding is zero bits, which is the lowest signed code.
        padding = ((0, 0), (0, row - codes.shape[1]))
        codes = np.pad(codes, padding, constant_values=-zero_code(bits))
    stored = np.ascontiguousarray(codes).view(np.uint8)
    if bits == 8:
        return (stored ^ np.uint8(0x80)).view("<u4")
    if bits == 4:
        # In two's complement q + 8 is q with bit 3 flipped, so a pair of codes becomes a byte without arithmetic.
        pairs = stored.view("<u2")
        return (((pairs & 0xF) | ((pairs >> 4) & 0xF0)) ^ 0x88).astype(np.uint8).view("<u4")
    fours = stored.view("<u4")
    folded = (fours & 0x3) | ((fours >> 6) & 0xC) | ((fours >> 12) & 0x30) | ((fours >> 18) & 0xC0)
    return (folded ^ 0xAA).astype(np.uint8).view("<u4")


def unpack(packed: Words, bits: int, width: int) -> Unsigned:
    """Unsigned codes `[rows, width]` out of words `[rows, words(width, bits)]`; 1 to 8 bits."""
    stored = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return stored[:, :width]
    if bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        mask = np.uint8((1 << bits) - 1)
        return ((stored[..., None] >> shifts) & mask).reshape(len(stored), -1)[:, :width]
    stream = np.unpackbits(stored, axis=1, bitorder="little")[:, : width * bits]
    weights = (1 << np.arange(bits)).astype(np.uint8)
    codes: Unsigned = (stream.reshape(len(stored), width, bits) * weights).sum(axis=2, dtype=np.uint8)
    return codes


def signed(codes: Unsigned, bits: int) -> Codes:
    """Signed codes out of unsigned ones."""
    # The subtraction wraps around into two's complement.
    return (codes - np.uint8(zero_code(bits))).view(np.int8)
