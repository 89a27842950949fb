"""Which grid each of GGUF's block types is, and how its bytes become codes, scales and shifts.

A type that is not here is one without integer codes (floats), or one of codebooks too large to be called a grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gguf.constants import GGMLQuantizationType as Type

from gemexport.formats.gguf import blocks, superblocks
from gemexport.formats.gguf.blocks import BLOCK, E2M1, WIDE_BLOCK, Bytes
from gemexport.formats.gguf.superblocks import NARROW
from gemexport.formats.tensor import Codes, Floats, Grid, Rows, on_grid

# Bytes `[rows, bytes]` in; codes `[rows, in]`, scales and perhaps biases `[rows, in // block]` out.
Unpack = Callable[[Bytes], tuple[Codes, Floats] | tuple[Codes, Floats, Floats]]


@dataclass(frozen=True)
class Layout:
    """A block type: its grid, and its bytes as codes, scales and shifts."""

    grid: Grid
    unpack: Unpack

    def rows(self, data: Bytes) -> Rows:
        """Rows of a tensor out of their bytes."""
        return on_grid(self.grid, *self.unpack(data))


# The offsets of Q4_1, Q5_1 and the K-quants are the file's own: that all of a tensor's are those of a symmetric grid
# can only be known by reading it whole, and nobody writes such a file.
LAYOUTS: dict[Type, Layout] = {
    Type.Q4_0: Layout(Grid(4, BLOCK, "f16", lossless=True), blocks.unpack_q4_0),
    Type.Q4_1: Layout(Grid(4, BLOCK, "f16", lossless=True, kind="affine"), blocks.unpack_q4_1),
    Type.Q5_0: Layout(Grid(5, BLOCK, "f16", lossless=True), blocks.unpack_q5_0),
    Type.Q5_1: Layout(Grid(5, BLOCK, "f16", lossless=True, kind="affine"), blocks.unpack_q5_1),
    Type.Q8_0: Layout(Grid(8, BLOCK, "f16", lossless=True), blocks.unpack_q8_0),
    Type.TQ2_0: Layout(Grid(2, WIDE_BLOCK, "f16", lossless=True), blocks.unpack_tq2_0),
    Type.MXFP4: Layout(Grid(4, BLOCK, "bf16", lossless=True, kind="codebook", levels=E2M1), blocks.unpack_mxfp4),
    Type.Q2_K: Layout(Grid(2, NARROW, "f32", lossless=True, kind="affine"), superblocks.unpack_q2_k),
    Type.Q3_K: Layout(Grid(3, NARROW, "f32", lossless=True), superblocks.unpack_q3_k),
    Type.Q4_K: Layout(Grid(4, BLOCK, "f32", lossless=True, kind="affine"), superblocks.unpack_q4_k),
    Type.Q5_K: Layout(Grid(5, BLOCK, "f32", lossless=True, kind="affine"), superblocks.unpack_q5_k),
    Type.Q6_K: Layout(Grid(6, NARROW, "f32", lossless=True), superblocks.unpack_q6_k),
}
