"""Integer codes as a dense stream of bits, the lowest first, row by row: what MLX, compressed-tensors and GPTQ pack.

They store an unsigned code, q + 2**(bits - 1) for a signed q, and pad a row with zero bits to whole 32-bit words
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
    """Codes `[rows, in]` of 1 to 8 bits as words `[rows, words(in, bits)]`; int8 codes are signed, uint8 ones not."""
    row = words(codes.shape[1], bits) * 32
    # Codes that straddle bytes are packed in groups of eight, which take `bits` bytes.
    width = row // bits if bits in (2, 4, 8) else -(-row // (8 * bits)) * 8
    signed_ = codes.dtype == np.int8
    if width != codes.shape[1]:
        # The padding is zero bits, which is the lowest signed code.
        padding = ((0, 0), (0, width - codes.shape[1]))
        codes = np.pad(codes, padding, constant_values=-zero_code(bits) if signed_ else 0)
    stored = np.ascontiguousarray(codes).view(np.uint8)
    # In two's complement q + 2**(bits - 1) is q with its highest bit flipped.
    flip = zero_code(bits) if signed_ else 0
    if bits == 8:
        return (stored ^ np.uint8(flip)).view("<u4")
    if bits == 4:
        # A pair of codes becomes a byte without arithmetic; the upper byte of the pair falls away.
        pairs = stored.view("<u2") & 0x0F0F
        pairs |= pairs >> 4
        nibbles = pairs.astype(np.uint8)
        nibbles ^= flip * 0x11
        return nibbles.view("<u4")
    if bits == 2:
        fours = stored.view("<u4")
        folded = (fours & 0x3) | ((fours >> 6) & 0xC) | ((fours >> 12) & 0x30) | ((fours >> 18) & 0xC0)
        return (folded ^ (flip * 0x55)).astype(np.uint8).view("<u4")
    eights = ((stored ^ np.uint8(flip)) & np.uint8((1 << bits) - 1)).reshape(len(stored), -1, 8).astype("<u8")
    joined = np.bitwise_or.reduce(eights << (np.arange(8, dtype=np.uint64) * np.uint64(bits)), axis=2)
    stream = joined[..., None].view(np.uint8)[..., :bits].reshape(len(stored), -1)
    return np.ascontiguousarray(stream[:, : row // 8]).view("<u4")


def fields(packed: NDArray[np.uint8], bits: int) -> Unsigned:
    """Numbers `[…, n * 8 / bits]` of 1, 2, 4 or 8 bits out of bytes `[…, n]`, the lowest bits first.

    A byte is widened to as many bytes as it holds numbers, and each number moved into its own: all in long runs.
    """
    if bits == 8:
        return packed
    share = 8 // bits
    wide = packed.astype(f"<u{share}")
    spread = wide.copy()
    for place in range(1, share):
        spread |= wide << wide.dtype.type(place * (8 - bits))
    spread &= wide.dtype.type(int.from_bytes(bytes([(1 << bits) - 1] * share), "little"))
    return spread.view(np.uint8)


def unpack(packed: NDArray[np.generic], bits: int, width: int) -> Unsigned:
    """Unsigned codes `[rows, width]` of 1 to 8 bits out of packed rows of any integer dtype."""
    stored = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return stored[:, :width]
    if bits in (1, 2, 4):
        return fields(stored, bits)[:, :width]
    groups = -(-width // 8)
    stream = np.zeros((len(stored), groups * bits), np.uint8)
    kept = min(stored.shape[1], stream.shape[1])
    stream[:, :kept] = stored[:, :kept]
    eights = np.zeros((len(stored), groups, 8), np.uint8)
    eights[..., :bits] = stream.reshape(len(stored), groups, bits)
    shifted = eights.view("<u8") >> (np.arange(8, dtype=np.uint64) * np.uint64(bits))
    codes: Unsigned = (shifted.astype(np.uint8) & np.uint8((1 << bits) - 1)).reshape(len(stored), -1)
    return codes[:, :width]


def signed(codes: Unsigned, bits: int) -> Codes:
    """Signed codes out of unsigned ones."""
    # The subtraction wraps around into two's complement.
    return (codes - np.uint8(zero_code(bits))).view(np.int8)
