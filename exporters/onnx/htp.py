"""The decoder for NPUs that compute in integers (Qualcomm's HTP): static scales on every activation, per-row weights.

It is the graph of npu.py but for what that compiler, or a static scale, does not stand: blocks of weights, a mask
that is added, and a rotation whose halves have ranges of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gemexport.exporters.onnx.graph import Weights
from gemexport.exporters.onnx.npu import INTEGERS, MASKED, WEIGHTS, NpuBackend
from gemexport.exporters.onnx.qdq import DTYPES, QdqGraph, constant_encoding
from gemexport.formats.gemma.architecture import Architecture, Layer
from gemexport.formats.gemma.names import EMBEDDING, HEAD, attention_module
from gemexport.formats.onnx import DERIVED, OFFSET, SCALES
from gemexport.formats.onnx.blocks import pack_signed
from gemexport.formats.tensor import Floats, Grid, Rows, Tensor


class HtpBackend(NpuBackend):
    """`decoder.Backend` on a `QdqGraph`."""

    graph: QdqGraph

    def __init__(self, a: Architecture, graph: QdqGraph, weights: Weights, length: int, context: int) -> None:
        super().__init__(a, graph, weights, length, context)
        self.graph = graph
        self._widths: dict[ir.Value, int] = {}  # of the last axis, behind a linear

    def embedded(self) -> tuple[ir.Value, ir.Value | None]:
        g = self.graph
        x, tokens = super().embedded()
        return g.activation(x, "inputs_embeds"), None if tokens is None else g.activation(tokens, "per_layer_inputs")

    def linear(self, x: ir.Value, weight: str) -> ir.Value:
        g, settings = self.graph, self.graph.activations
        name = weight.removesuffix(".weight")
        key, output = f"{name}.input", f"{name}.output"
        if key in settings.given or settings.linear_bits != settings.bits:
            x = g.recoded(x, key, None if g.measuring else settings.encoding(key, settings.linear_bits))
            # The NPU multiplies into integers of the width that it reads.
            x = x if settings.width(output, settings.linear_bits) == 8 else g.wide(x)
        values = self._rows(self.weights.tensors[weight])
        y = g.op("MatMul", [x, values], key=output, bits=settings.linear_bits)
        y = y if settings.bits == 8 else g.wide(y)
        self._widths[y] = self.weights.tensors[weight].shape[0]
        return y

    def split(self, x: ir.Value, parts: int) -> ir.Value:
        y = super().split(x, parts)
        if x in self._widths:
            self._widths[y] = self._widths[x] // parts
        return y

    def _rows(self, tensor: Tensor) -> ir.Value:
        """A weight `[in, out]` out of codes with one scale a column; the NPU knows no blocks."""
        (out, width), grid = tensor.shape, row_grid(tensor)
        own = tensor.grid is not None and held_by_rows(tensor.grid, width)
        bits = 4 if grid.bits <= 4 and out % 2 == 0 else 8

        def codes(part: Rows) -> NDArray[Any]:
            found = part.grid()[0] if own else by_rows(part)[0]
            return pack_signed(np.ascontiguousarray(found.T), bits)

        def scales(part: Rows) -> NDArray[Any]:
            return (part.grid()[1] if own else by_rows(part)[1]).astype(np.float32).T

        plan, name = self.weights.plan, tensor.name
        packed = plan(name, "row columns", INTEGERS[bits, True], [width, out], codes, file=WEIGHTS, columns=1)
        factors = plan(name, "row column scales", ir.DataType.FLOAT, [out], scales, file=WEIGHTS, columns=1)
        weight = self._weight(tensor, packed) if own else self._derived(name, packed)
        scale = self.graph.external(f"{weight.name}{SCALES}", factors)
        # QNN's provider tells 4-bit weights from 8-bit ones by their zero points; without, it computes other numbers.
        zeros = self._zeros(weight, bits, [out], name)
        return self.graph.raw("DequantizeLinear", [weight, scale, zeros], axis=1)

    def _derived(self, name: str, stored: ir.ExternalTensor) -> ir.Value:
        """A weight on another grid than its own; of a tied one the lookup's table is what counts."""
        if name == EMBEDDING:
            return self.graph.external(HEAD, stored, metadata={DERIVED: EMBEDDING})
        return self.graph.external(name, stored)

    def rms_norm(self, x: ir.Value, weight: str | None, eps: float, offset: float) -> ir.Value:
        if weight is None:
            # ONNX would broadcast a single 1, and the HTP takes that too, but reads other numbers behind it.
            ones = self.graph.constant_activation(np.ones(self._widths[x], np.float32))
            return self.graph.op("RMSNormalization", [x, ones], axis=-1, epsilon=eps)
        scale = self._norm(weight, offset)
        key = f"{weight.removesuffix('.weight')}.output"
        return self.graph.op("RMSNormalization", [x, scale], key=key, axis=-1, epsilon=eps)

    def constant(self, weight: str) -> ir.Value:
        return self._norm(weight, 0.0)

    def _norm(self, weight: str, offset: float) -> ir.Value:
        """A norm's weights, plus the family's offset."""
        values = self.weights.tensors[weight].numpy() + np.float32(offset)
        encoding = constant_encoding(values, self.graph.activations.bits)
        layout, dtype = f"{encoding.bits} bits", DTYPES[encoding.numpy.name]
        stored = self.weights.plan(weight, layout, dtype, values.shape, encoding.encode(values), file=WEIGHTS)
        metadata = {OFFSET: repr(offset)} if offset else None
        return self.graph.dequantized(self.graph.external(weight, stored, metadata=metadata), encoding)

    def number(self, value: float) -> ir.Value:
        return self.graph.constant_activation(np.array([value], np.float32))

    def softcap(self, x: ir.Value, cap: float) -> ir.Value:
        return self.scale(self.graph.op("Tanh", [self.scale(x, 1 / cap)]), cap)

    def rotary(self, x: ir.Value, layer: Layer) -> ir.Value:
        g, half = self.graph, layer.head_dim // 2
        cos, sin = self._rotation(layer)
        a, b = g.ops("Split", 2, [x, g.constant([half, half], np.int64)], axis=-1)
        return self.add(self.mul(x, cos), self.mul(g.op("Concat", [b, a], axis=-1), sin))

    def _rope_tables(self, cosines: Floats, sines: Floats) -> tuple[Floats, Floats]:
        """Of whole heads, sines with their signs, for x·cos + (halves of x swapped)·sin."""
        return np.tile(cosines, (1, 2)), np.concatenate([-sines, sines], axis=1)

    def _rope_rows(self, name: str, values: Floats, here: ir.Value) -> ir.Value:
        g = self.graph
        encoding = constant_encoding(np.array([-1, 1], np.float32), g.activations.bits)
        stored = self.weights.plan(
            name, f"{encoding.bits} bits", DTYPES[encoding.numpy.name], values.shape, encoding.encode(values),
            file=WEIGHTS,
        )  # fmt: skip
        rows = g.op("Gather", [g.dequantized(g.external(name, stored), encoding), here], axis=0)
        return g.op("Unsqueeze", [rows, g.constant([2], np.int64)])

    def remember(self, k: ir.Value, v: ir.Value, layer: Layer) -> None:
        g = self.graph
        shape = [1, layer.kv_heads, self.cache_length(layer), layer.head_dim]
        kept = []
        for kind, new in (("key", k), ("value", v)):
            key = f"{attention_module(layer.index)}.{kind}_cache"
            encoding = None if g.measuring else g.activations.cache(key)
            dtype = ir.DataType.FLOAT if encoding is None else DTYPES[encoding.numpy.name]
            past = g.input(f"past_key_values.{layer.index}.{kind}", dtype, shape)
            past = past if encoding is None else g.dequantized(past, encoding)
            turned = g.recoded(g.op("Transpose", [new], perm=[0, 2, 1, 3]), key, encoding)
            whole = g.op("Concat", [past, turned], axis=2)
            ends = (g.constant([at], np.int64) for at in (self.length, self.length + shape[2], 2))
            last = g.raw("Slice", [whole, *ends])
            last = last if encoding is None else g.quantized(last, encoding)
            g.output(last, f"present.{layer.index}.{kind}", dtype, shape)
            kept.append(whole)
        self._cache[layer.index] = kept[0], kept[1]

    def attention(self, q: ir.Value, layer: Layer, scale: float, softcap: float | None) -> ir.Value:
        g, n = self.graph, self.length
        name = attention_module(layer.index)
        keys, values = self._cache[layer.kv_source]
        groups = self.a.heads // layer.kv_heads
        seen = self.cache_length(layer) + n
        asked = self.scale(g.op("Transpose", [q], perm=[0, 2, 1, 3]), scale)
        asked = self.reshape(asked, [1, layer.kv_heads, groups * n, layer.head_dim])
        turned = g.op("Transpose", [keys], perm=[0, 1, 3, 2])
        if softcap is None:
            scores = g.op("MatMul", [asked, turned], key=f"{name}.scores", watch=False)
        else:
            scores = self.softcap(g.op("MatMul", [asked, turned]), softcap)
            if not g.measuring:
                scores = g.recoded(scores, f"{name}.scores", g.activations.encoding(f"{name}.scores"))
        scores = self._masked(self.reshape(scores, [layer.kv_heads, groups, n, seen]), layer, f"{name}.scores")
        shares = self.reshape(g.op("Softmax", [scores], axis=-1), [1, layer.kv_heads, groups * n, seen])
        read = g.op("MatMul", [shares, values], key=f"{name}.read")
        return g.op("Transpose", [self.reshape(read, [1, self.a.heads, n, layer.head_dim])], perm=[0, 2, 1, 3])

    def _masked(self, scores: ir.Value, layer: Layer, key: str) -> ir.Value:
        """Scores, where a query does not see a key the least that their encoding holds.

        What matters of a row lies within some nats of its maximum, so that is the range: far lower scores may saturate.
        With all the row's keys that low their shares come to less than a step of the softmax.
        """
        g = self.graph
        encoding = g.encoding(scores)
        if encoding is None:
            masked = g.op("Where", [self._sees(layer), scores, g.constant(MASKED, np.float32)])
            seen = self.cache_length(layer) + self.length
            g.watched_scores[key] = masked, float(np.log(seen) + g.activations.bits * np.log(2))
            return masked
        least = g.integers(np.array(encoding.limits[0]), encoding)
        return g.op("Where", [self._sees(layer), scores, least])


def held_by_rows(grid: Grid, width: int) -> bool:
    """Whether the NPU's linears take a grid as it is: signed codes with one scale for a row of `width` weights."""
    return grid.kind == "symmetric" and grid.block == width and grid.bits in (2, 4, 8)


def row_grid(tensor: Tensor) -> Grid:
    """The grid that a weight has in the graph: its own where that is one scale a row, else 8 bits."""
    width = tensor.shape[1]
    if tensor.grid is not None and held_by_rows(tensor.grid, width):
        return tensor.grid
    return Grid(bits=8, block=width, scale_dtype="f32", lossless=False)


def by_rows(part: Rows) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rows of values as 8-bit codes with one scale a row, largest weight at 127."""
    scales = np.abs(part.values).max(axis=1, keepdims=True) / np.float32(127)
    scales[scales == 0] = 1
    return np.rint(part.values / scales).astype(np.int8), scales
