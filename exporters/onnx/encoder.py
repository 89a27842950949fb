"""A model that makes one vector of a text, in ONNX Runtime's operators: no caches, and attention both ways.

Inputs and outputs are named as in onnx-community's EmbeddingGemma: `input_ids` and `attention_mask` in,
`last_hidden_state` and `sentence_embedding` out. Texts of a batch may be filled up with any tokens at their end, which
the mask leaves out.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gemexport.exporters.graphs.decoder import vectors
from gemexport.exporters.onnx.common import StandardOperations
from gemexport.exporters.onnx.graph import GraphBuilder, Weights
from gemexport.exporters.onnx.runtime import WEIGHTS, OnnxRuntimeBackend
from gemexport.formats.gemma.architecture import Architecture, Layer, Rope
from gemexport.formats.gemma.embedder import Embedder
from gemexport.formats.onnx import EMBEDDING_OUTPUT, HIDDEN_OUTPUT

UNSEEN = -1e30  # added to scores: finite, so that a row of nothing else is no NaN
SHORTEST = 1e-12  # length that a vector is divided by at least, as in PyTorch's normalize


class EncoderBackend(OnnxRuntimeBackend):
    """`decoder.TextBackend`, over the lookups, linears and rotations of the decoder's."""

    def __init__(self, a: Architecture, graph: GraphBuilder, weights: Weights, quantized: bool) -> None:
        StandardOperations.__init__(self, graph, weights, WEIGHTS)
        self.a, self.quantized = a, quantized
        self.ids = graph.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        mask = graph.input("attention_mask", ir.DataType.INT64, ["batch_size", "sequence_length"])
        self.held = self.cast(mask, ir.DataType.FLOAT)
        length = graph.op("Gather", [graph.op("Shape", [self.ids]), graph.constant(1, np.int64)], axis=0)
        self.steps = graph.op("Range", [graph.constant(0, np.int64), length, graph.constant(1, np.int64)])
        self.positions = graph.op("Expand", [self.steps, graph.op("Shape", [self.ids])])
        self.order = self._order()
        self._angles: dict[tuple[Rope, int], tuple[ir.Value, ir.Value]] = {}
        self._read: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._masks: dict[bool, ir.Value] = {}

    def remember(self, k: ir.Value, v: ir.Value, layer: Layer) -> None:
        self._read[layer.index] = k, v

    def attention(self, q: ir.Value, layer: Layer, scale: float, softcap: float | None) -> ir.Value:
        g = self.graph
        k, v = self._read[layer.kv_source]
        groups = self.a.heads // layer.kv_heads
        # `[batch, kv_heads, groups, n, head_dim]`: heads that share keys stand beside each other.
        q = self.reshape(self.scale(q, scale), [0, 0, layer.kv_heads, groups, layer.head_dim])
        q = g.op("Transpose", [q], perm=[0, 2, 3, 1, 4])
        shared = g.constant([2], np.int64)
        k = g.op("Unsqueeze", [g.op("Transpose", [k], perm=[0, 2, 3, 1]), shared])
        v = g.op("Unsqueeze", [g.op("Transpose", [v], perm=[0, 2, 1, 3]), shared])
        scores = g.op("MatMul", [q, k])
        scores = scores if softcap is None else self.softcap(scores, softcap)
        read = g.op("MatMul", [self.softmax(self.add(scores, self._mask(layer.sliding))), v])
        return self.reshape(g.op("Transpose", [read], perm=[0, 3, 1, 2, 4]), [0, 0, self.a.heads, layer.head_dim])

    def _mask(self, sliding: bool) -> ir.Value:
        """What is added to scores `[batch, kv_heads, groups, n, n]` where a position is too far, or holds no token."""
        g = self.graph
        if sliding not in self._masks:
            empty = g.op("Unsqueeze", [self.held, g.constant([1, 2, 3], np.int64)])
            unseen = g.op("Less", [empty, self.number(0.5)])
            if sliding:
                column, row = (g.op("Unsqueeze", [self.steps, g.constant([axis], np.int64)]) for axis in (1, 0))
                apart = g.op("Abs", [g.op("Sub", [column, row])])
                unseen = g.op("Or", [unseen, g.op("Greater", [apart, g.constant(self.a.reach, np.int64)])])
            self._masks[sliding] = g.op("Where", [unseen, self.number(UNSEEN), self.number(0.0)])
        return self._masks[sliding]

    def mean(self, x: ir.Value) -> ir.Value:
        g = self.graph
        axis = g.constant([1], np.int64)
        held = g.op("Unsqueeze", [self.held, g.constant([2], np.int64)])
        total = g.op("ReduceSum", [self.mul(x, held), axis], keepdims=0)
        return g.op("Div", [total, g.op("ReduceSum", [self.held, axis], keepdims=1)])

    def unit(self, x: ir.Value) -> ir.Value:
        g = self.graph
        length = g.op("ReduceL2", [x, g.constant([1], np.int64)], keepdims=1)
        return g.op("Div", [x, g.op("Max", [length, self.number(SHORTEST)])])


def add_vectors(a: Architecture, e: Embedder, graph: GraphBuilder, weights: Weights, quantized: bool) -> GraphBuilder:
    """The whole graph, with its outputs."""
    hidden, vector = vectors(a, e, EncoderBackend(a, graph, weights, quantized))
    graph.output(hidden, HIDDEN_OUTPUT, ir.DataType.FLOAT, ["batch_size", "sequence_length", a.hidden_size])
    graph.output(vector, EMBEDDING_OUTPUT, ir.DataType.FLOAT, ["batch_size", e.size(a.hidden_size)])
    return graph
