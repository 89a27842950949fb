"""What the decoder's operations have in common on both ONNX targets: all but weights, rotation and attention."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gemexport.exporters.onnx.graph import GraphBuilder, Weights
from gemexport.formats.onnx.blocks import pack, pack_unsigned
from gemexport.formats.tensor import DType, Rows, Tensor

WIDTHS = (2, 4, 8)  # bits that there are containers for; what lies between goes into the next wider one
KINDS = ("symmetric", "zero-point")
LEAST = 1e-5  # mean square of a stream, see `Backend.as_large`


def stored_bits(bits: int, row: int) -> int:
    """The narrowest container for rows of `row` codes of `bits` bits that fill whole bytes."""
    return next(width for width in WIDTHS if width >= bits and row * width % 8 == 0)


def packed_codes(rows: Rows, bits: int) -> NDArray[np.uint8]:
    """Codes of a symmetric or a zero-point grid, unsigned, `[rows, in * bits / 8]`."""
    codes = rows.grid()[0]
    return pack(codes, bits) if rows.shifts is None else pack_unsigned(codes.view(np.uint8), bits)


def zero_points(rows: Rows, bits: int) -> NDArray[np.uint8]:
    """Zero points `[rows, blocks]`, one a byte; ValueError where `bits` bits do not hold one."""
    zeros = rows.shifted()[2]
    if zeros.min(initial=0) < 0 or zeros.max(initial=0) >= 1 << bits:
        raise ValueError(f"a zero point lies outside of {bits} bits")
    return zeros.astype(np.uint8)


class StandardOperations:
    """The operations that the ONNX standard spells the same for every runtime, on values `[batch, n, …]` in f32."""

    def __init__(self, graph: GraphBuilder, weights: Weights, file: str) -> None:
        self.graph, self.weights, self.file = graph, weights, file

    def rms_norm(self, x: ir.Value, weight: str | None, eps: float, offset: float) -> ir.Value:
        g = self.graph
        if weight is None:
            scale = g.constant([1.0], np.float32)  # the operator wants one, and broadcasts it
        else:
            scale = self.constant(weight)
            scale = g.op("Add", [scale, self.number(offset)]) if offset else scale
        return g.op("RMSNormalization", [x, scale], axis=-1, epsilon=eps)

    def split(self, x: ir.Value, parts: int) -> ir.Value:
        return self.reshape(x, [0, 0, parts, -1])

    def merge(self, x: ir.Value) -> ir.Value:
        return self.reshape(x, [0, 0, -1])

    def part(self, x: ir.Value, index: int) -> ir.Value:
        return self.graph.op("Gather", [x, self.graph.constant(index, np.int64)], axis=2)

    def constant(self, weight: str) -> ir.Value:
        values = self.weights.tensors[weight].numpy()
        stored = self.weights.plan(weight, "plain", ir.DataType.FLOAT, values.shape, values, file=self.file)
        return self.graph.external(weight, stored)

    def gelu(self, x: ir.Value) -> ir.Value:
        return self.graph.op("Gelu", [x], approximate="tanh")

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.graph.op("Add", [a, b])

    def mul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.graph.op("Mul", [a, b])

    def scale(self, x: ir.Value, factor: float) -> ir.Value:
        return x if factor == 1.0 else self.mul(x, self.number(factor))

    def softcap(self, x: ir.Value, cap: float) -> ir.Value:
        limit = self.number(cap)
        return self.mul(self.graph.op("Tanh", [self.graph.op("Div", [x, limit])]), limit)

    def above(self, x: ir.Value, deviations: float) -> ir.Value:
        centred = self.graph.op("Sub", [x, self._mean(x)])
        least = self.scale(self.graph.op("Sqrt", [self._mean(self.mul(centred, centred))]), deviations)
        return self.graph.op("Relu", [self.graph.op("Sub", [centred, least])])

    def as_large(self, x: ir.Value, like: ir.Value) -> ir.Value:
        have = self.graph.op("Max", [self._mean(self.mul(x, x)), self.number(LEAST)])
        return self.mul(x, self.graph.op("Sqrt", [self.graph.op("Div", [self._mean(self.mul(like, like)), have])]))

    def _mean(self, x: ir.Value) -> ir.Value:
        """`[…, 1]`: the mean of the last axis."""
        return self.graph.op("ReduceMean", [x, self.graph.constant([-1], np.int64)], keepdims=1)

    def known(self, ids: ir.Value, tensor: Tensor, vocabulary: int) -> ir.Value:
        """Ids that a table `tensor` of fewer rows than the vocabulary has, the first for those that it has not."""
        if tensor.shape[0] >= vocabulary:
            return ids
        there = self.graph.op("Less", [ids, self.graph.constant(tensor.shape[0], np.int64)])
        return self.graph.op("Where", [there, ids, self.graph.constant(0, np.int64)])

    def softmax(self, x: ir.Value) -> ir.Value:
        return self.graph.op("Softmax", [x], axis=-1)

    def best(self, x: ir.Value, k: int) -> tuple[ir.Value, ir.Value]:
        values, ids = self.graph.ops("TopK", 2, [x, self.graph.constant([k], np.int64)], axis=-1)
        return values, ids

    def take(self, weight: str, ids: ir.Value) -> ir.Value:
        return self.graph.op("Gather", [self.constant(weight), ids], axis=0)

    def number(self, value: float) -> ir.Value:
        return self.graph.constant(value, np.float32)

    def reshape(self, x: ir.Value, shape: list[int]) -> ir.Value:
        return self.graph.op("Reshape", [x, self.graph.constant(shape, np.int64)])

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.graph.op("Cast", [x], to=int(dtype))

    def to_float(self, value: ir.Value, dtype: DType) -> ir.Value:
        """A stored weight of `dtype` as f32; the runtime folds the cast when it loads the model."""
        return value if dtype == "f32" else self.cast(value, ir.DataType.FLOAT)
