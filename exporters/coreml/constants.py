"""The matrices of a decoder as constants of an ML program, in whatever form holds their grid.

Affine grids have no operation of their own: an offset in units of the scale cannot hold every bias. What the nearest
zero point leaves of a bias is a constant `[out, in // block]` beside the matrix, and whoever reads the matrix adds it
(`backend.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

from gemexport.exporters.coreml.forms import INDICES, Float, form, held, row_slices
from gemexport.exporters.coreml.weights import Sources, placeholder
from gemexport.formats.coreml import BIASES, CODEBOOK, SCALES, stored_name
from gemexport.formats.tensor import Grid, Tensor

Var = Any


@dataclass(frozen=True)
class Matrix:
    """A matrix `[out, in]` of the graph, or a stack of such; `biases` `[…, in // block]` are part of an affine one."""

    weight: Var
    biases: Var | None = None
    block: int = 0


@dataclass(frozen=True)
class Sum:
    """A matrix in the vector codec: the sum of `parts` `[out, in]`, times `scales` `[out, in / block]`."""

    parts: tuple[Var, ...]
    scales: Var
    block: int


def vectors(tensor: Tensor, grid: Grid, sources: Sources) -> Sum:
    """A tensor's constants, placeholders until `sources` fills them: a palette of vectors for each codebook."""
    stored, (out, width) = stored_name(tensor.name), tensor.shape
    bits = next(bits for bits in INDICES if bits >= grid.bits)
    parts = []
    for m, book in enumerate(grid.vectors):
        table = np.zeros((1, 1, 1 << bits, grid.vector), np.float16)
        table[0, 0, : len(book)] = book
        parts.append(
            mb.constexpr_lut_to_dense(
                indices=_empty(f"{stored}_codes_{m}", (out, width // grid.vector), f"uint{bits}"),
                lut=mb.const(val=table, name=f"{stored}_vectors_{m}"),
                vector_axis=np.int32(1),
                name=f"{stored}{CODEBOOK}{m}",
            )
        )
    kind: Float = "fp16" if grid.scale_dtype == "f16" else "fp32"
    scales = _empty(f"{stored}{SCALES}", (out, width // grid.block), kind)
    sources.vectors(stored, tensor, grid, kind)
    return Sum(tuple(parts), scales, grid.block)


def matrix(tensor: Tensor, sources: Sources) -> Matrix:
    """A tensor's constants, placeholders until `sources` fills them: on its grid where it has one and may keep it."""
    stored = stored_name(tensor.name)
    if tensor.grid is None or sources.variant != "int4":
        kind = _kind(tensor, sources.variant)
        sources.floats(stored, tensor, kind)
        return Matrix(_empty(stored, tensor.shape, kind))
    kept = form(tensor)
    blocks = (*tensor.shape[:-1], tensor.shape[-1] // tensor.grid.block)
    data = _empty(f"{stored}_codes", tensor.shape, kept.codes)
    if kept.table is not None:
        table = mb.const(val=kept.table.reshape(*[1] * len(tensor.shape), -1, 1), name=f"{stored}_table")
        data = mb.constexpr_lut_to_dense(indices=data, lut=table, name=f"{stored}_levels")
    beside = {"scale": _empty(f"{stored}_scales", blocks, kept.scales)}
    if kept.offsets is not None:
        beside["offset"] = _empty(f"{stored}_offsets", blocks, kept.offsets)
    weight = mb.constexpr_blockwise_shift_scale(data=data, **beside, name=stored)
    biases = None if kept.biases is None else _empty(f"{stored}{BIASES}", blocks, kept.biases)
    sources.grid(stored, tensor, kept)
    return Matrix(weight, biases, tensor.grid.block)


def _kind(tensor: Tensor, variant: str) -> Float:
    """The element type of a matrix without a grid: beside codes, one that holds every value as it is."""
    if variant != "int4" or tensor.dtype == "f16":
        return "fp32" if variant == "f32" else "fp16"
    return "fp16" if all(held(tensor.rows(*bounds).values, "fp16") for bounds in row_slices(tensor)) else "fp32"


def _empty(name: str, shape: tuple[int, ...], kind: str) -> Var:
    dtype = types.nptype_from_builtin(types.string_to_builtin(kind))
    return mb.const(val=placeholder(shape, dtype), name=name)
