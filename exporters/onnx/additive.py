"""Rows of a matrix in the vector codec (formats/grids/additive.py) in operators of the ONNX standard.

Codes are looked up by id, vectors by code, and the vectors added: three Gathers' worth of integers and no arithmetic on
packed bits, so codes take a whole byte each.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from gemexport.exporters.onnx.graph import FLOATS, GraphBuilder, Weights, stored_floats
from gemexport.formats.onnx import CODEBOOKS, CODEC, FITTED_RMS, SCALES
from gemexport.formats.tensor import Tensor


def additive_rows(graph: GraphBuilder, weights: Weights, tensor: Tensor, ids: ir.Value, file: str) -> ir.Value:
    """Rows `[batch, n, in]` at `ids` `[batch, n]`, f32; codes, codebooks and scales are planned in `file`."""
    grid, name, (out, width) = tensor.grid, tensor.name, tensor.shape
    assert grid is not None
    dtype, blocks = grid.scale_dtype, width // grid.block
    vectors, entries = width // grid.vector, grid.codebooks << grid.bits
    codes = weights.plan(
        name, "vector codes", ir.DataType.UINT8, [out, vectors, grid.codebooks], lambda rows: rows.grid()[0], file=file
    )
    books = weights.plan(
        name, "codebooks", ir.DataType.FLOAT16, [entries, grid.vector], grid.vectors.astype(np.float16), file=file
    )
    scales = weights.plan(
        name,
        "vector scales",
        FLOATS[dtype],
        [out, blocks],
        lambda rows: stored_floats(rows.grid()[1], dtype),
        file=file,
    )
    about = {CODEC: str(grid.codec)} | ({} if tensor.fitted_rms is None else {FITTED_RMS: repr(tensor.fitted_rms)})
    chosen = graph.op("Gather", [graph.external(name, codes, metadata=about), ids], axis=0)
    # All codebooks are one table: a code counts from where its own begins.
    begins = graph.constant(np.arange(grid.codebooks) << grid.bits, np.int32)
    places = graph.op("Add", [graph.op("Cast", [chosen], to=int(ir.DataType.INT32)), begins])
    found = graph.op("Gather", [_floats(graph, f"{name}{CODEBOOKS}", books), places], axis=0)
    sums = graph.op("ReduceSum", [found, graph.constant([3], np.int64)], keepdims=0)
    factors = graph.op("Gather", [_floats(graph, f"{name}{SCALES}", scales), ids], axis=0)
    wide = graph.op("Reshape", [sums, graph.constant([0, 0, blocks, grid.block], np.int64)])
    scaled = graph.op("Mul", [wide, graph.op("Unsqueeze", [factors, graph.constant([3], np.int64)])])
    return graph.op("Reshape", [scaled, graph.constant([0, 0, width], np.int64)])


def byte_notes(tensors: Mapping[str, Tensor]) -> list[str]:
    """A sentence about codes that would fit into less than the byte that each takes."""
    return [
        f"codes of {tensor.grid.bits} bits take a byte each in {tensor.name}: ONNX looks up bytes"
        for tensor in tensors.values()
        if tensor.grid is not None and tensor.grid.kind == "vectors" and tensor.grid.bits < 8
    ]


def _floats(graph: GraphBuilder, name: str, stored: ir.ExternalTensor) -> ir.Value:
    value = graph.external(name, stored)
    return value if stored.dtype == ir.DataType.FLOAT else graph.op("Cast", [value], to=int(ir.DataType.FLOAT))
