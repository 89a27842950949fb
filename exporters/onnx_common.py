"""What the decoder's operations have in common on both ONNX targets: all but weights, rotation and attention."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gemexport.exporters.onnx_graph import GraphBuilder, Weights
from gemexport.formats.tensor import DType


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

    def number(self, value: float) -> ir.Value:
        return self.graph.constant(value, np.float32)

    def reshape(self, x: ir.Value, shape: list[int]) -> ir.Value:
        return self.graph.op("Reshape", [x, self.graph.constant(shape, np.int64)])

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.graph.op("Cast", [x], to=int(dtype))

    def to_float(self, value: ir.Value, dtype: DType) -> ir.Value:
        """A stored weight of `dtype` as f32; the runtime folds the cast when it loads the model."""
        return value if dtype == "f32" else self.cast(value, ir.DataType.FLOAT)
