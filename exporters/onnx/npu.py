"""The decoder for NPU compilers: operators of the ONNX standard alone, every size fixed, nothing that depends on data.

A cache holds the last `length` positions, the newest at its end: each run shifts new keys and values in from the
right, so nothing is written at a place that has to be computed. A position below zero is padding, left of the prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gemexport.exporters.graphs import decoder
from gemexport.exporters.onnx.additive import additive_rows
from gemexport.exporters.onnx.common import StandardOperations, packed_codes, stored_bits, zero_points
from gemexport.exporters.onnx.graph import FLOATS, Convert, GraphBuilder, Weights, stored_floats
from gemexport.formats.activations import Activations, CacheActivations, Quantizer
from gemexport.formats.gemma.architecture import Architecture, Layer, Rope
from gemexport.formats.gemma.names import EMBEDDING, HEAD
from gemexport.formats.onnx import BITS, COPY, SCALES, SHAPE, ZEROS
from gemexport.formats.onnx.blocks import pack_signed, pack_unsigned
from gemexport.formats.tensor import Floats, Grid, Rows, Tensor, matrix_of

MASKED = -30_000.0  # far below any score, and within f16, which NPUs compute in
TABLES, WEIGHTS = "embeddings.onnx.data", "decoder.onnx.data"
INTEGERS: dict[tuple[int, bool], ir.DataType] = {  # by bits, and whether they are signed
    (bits, signed): ir.DataType[f"{'' if signed else 'U'}INT{bits}"]
    for bits in (2, 4, 8, 16)
    for signed in (True, False)
}


def integer(quantizer: Quantizer) -> ir.DataType:
    """The type of a quantizer's integers."""
    return INTEGERS[quantizer.bits, quantizer.signed]


class NpuBackend(StandardOperations):
    """`decoder.Backend`, `length` positions at a time in a context of `context`; inputs appear as they are needed."""

    def __init__(
        self,
        a: Architecture,
        graph: GraphBuilder,
        weights: Weights,
        length: int,
        context: int,
        activations: Activations | None = None,
    ) -> None:
        super().__init__(graph, weights, WEIGHTS)
        self.a, self.length, self.context = a, length, context
        self.activations = activations or Activations()
        self._roundings: dict[tuple[ir.Value, Quantizer], ir.Value] = {}
        self._positions: ir.Value | None = None
        self._cache: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._rotations: dict[tuple[Rope, int], tuple[ir.Value, ir.Value]] = {}
        self._biases: dict[bool, ir.Value] = {}
        self._visible: dict[bool, ir.Value] = {}

    # What is looked up: a graph of its own, that may stay on the CPU beside a table too large for an NPU.

    def embedding(self, weight: str, scale: float) -> ir.Value:
        tensor = self.weights.tensors[weight]
        if not self.graph.inputs:
            self.graph.input("input_ids", ir.DataType.INT64, [1, "sequence_length"])
        ids = self.known(self.graph.inputs[0], tensor, self.a.vocab_size)
        if tensor.grid is None:
            dtype = FLOATS[tensor.dtype]
            rows = self.weights.plan(weight, "rows", dtype, tensor.shape, plain(tensor), file=TABLES)
            return self.scale(self.to_float(self._lookup(self.graph.external(weight, rows), ids), tensor.dtype), scale)
        if tensor.grid.kind == "vectors":
            return self.scale(additive_rows(self.graph, self.weights, tensor, ids, TABLES), scale)
        width, block = tensor.shape[1], tensor.grid.block
        bits = stored_bits(tensor.grid.bits, width)
        table, scales, zeros = self._table(tensor, tensor.grid, bits, ids)
        codes = self.reshape(self._unpacked(self._lookup(table, ids), bits), [0, 0, width // block, block])
        codes = self.graph.op("Sub", [codes, self.number(float(1 << (bits - 1))) if zeros is None else zeros])
        return self.scale(self.reshape(self.mul(codes, scales), [0, 0, width]), scale)

    def _table(
        self, tensor: Tensor, grid: Grid, bits: int, ids: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Packed rows, and what belongs to `ids` of their scales and zero points as f32 `[1, n, blocks, 1]`."""
        (rows, width), dtype = tensor.shape, grid.scale_dtype
        blocks, plan, name = width // grid.block, self.weights.plan, tensor.name

        def scales(part: Rows) -> NDArray[Any]:
            return stored_floats(part.grid()[1], dtype)

        def codes(part: Rows) -> NDArray[Any]:
            return packed_codes(part, bits)

        def looked_up(stored: ir.ExternalTensor, suffix: str) -> ir.Value:
            found = self._lookup(self.graph.external(f"{name}{suffix}", stored), ids)
            found = found if stored.dtype == ir.DataType.FLOAT else self.cast(found, ir.DataType.FLOAT)
            return self.reshape(found, [0, 0, blocks, 1])

        packed = plan(name, "rows", ir.DataType.UINT8, [rows, width * bits // 8], codes, file=TABLES)
        factors = looked_up(plan(name, "row scales", FLOATS[dtype], [rows, blocks], scales, file=TABLES), SCALES)
        table = self.graph.external(name, packed, metadata={BITS: str(bits)})
        if grid.kind == "symmetric":
            return table, factors, None
        shifts = plan(
            name, "row zeros", ir.DataType.UINT8, [rows, blocks], lambda part: zero_points(part, bits), file=TABLES
        )
        return table, factors, looked_up(shifts, ZEROS)

    def _lookup(self, table: ir.Value, ids: ir.Value) -> ir.Value:
        return self.graph.op("Gather", [table, ids], axis=0)

    def _unpacked(self, packed: ir.Value, bits: int) -> ir.Value:
        """Codes as f32 `[1, n, in]` out of bytes `[1, n, in * bits / 8]`, the first in the lowest bits."""
        g, fields = self.graph, []
        for place in range(8 // bits):
            # Masked first: OpenVINO 2026.4 divides in place of a shift, and rounds what was to fall off.
            mask = g.constant(((1 << bits) - 1) << (place * bits), np.uint8)
            field = g.op("BitwiseAnd", [packed, mask])
            if place:
                shift = g.constant(place * bits, np.uint8)
                field = g.op("BitShift", [field, shift], direction="RIGHT")
            fields.append(g.op("Unsqueeze", [field, g.constant([3], np.int64)]))
        together = fields[0] if len(fields) == 1 else g.op("Concat", fields, axis=3)
        return self.cast(self.merge(together), ir.DataType.FLOAT)

    # The decoder.

    def embedded(self) -> tuple[ir.Value, ir.Value | None]:
        """What `decoder.embed` gives, as inputs."""
        x = self.graph.input("inputs_embeds", ir.DataType.FLOAT, [1, self.length, self.a.hidden_size])
        if self.a.per_layer is None:
            return x, None
        shape = [1, self.length, len(self.a.layers) * self.a.per_layer.dim]
        return x, self.graph.input("per_layer_inputs", ir.DataType.FLOAT, shape)

    def linear(self, x: ir.Value, weight: str) -> ir.Value:
        rounding = self.activations.linear(HEAD if weight == EMBEDDING else weight)
        values = self._columns(self.weights.tensors[weight])
        return self._rounded(self.graph.op("MatMul", [self._rounded(x, rounding.input), values]), rounding.output)

    def experts(self, x: ir.Value, ids: ir.Value, shares: ir.Value, gate_up: str, down: str) -> ir.Value:
        """Every expert computes, and those that were not chosen have a share of nought: nothing depends on data.

        The first projections of all are one matrix, their rows one below the other, and so are the second ones, side
        by side: the sum over experts is part of the product.
        """
        g, (count, _, inner) = self.graph, self.weights.tensors[down].shape
        two, three = g.constant([2], np.int64), g.constant([3], np.int64)
        every = g.constant(np.arange(count), np.int64)
        chosen = g.op("Equal", [g.op("Unsqueeze", [ids, three]), every])
        parts = g.op("Where", [chosen, g.op("Unsqueeze", [shares, three]), self.number(0.0)])
        share = g.op("Unsqueeze", [g.op("ReduceSum", [parts, two], keepdims=0), three])
        h = g.op("MatMul", [x, self._columns(self.weights.tensors[gate_up])])
        h = self.reshape(h, [1, self.length, count, 2, inner])
        gate, up = (g.op("Gather", [h, g.constant(part, np.int64)], axis=3) for part in (0, 1))
        h = self.mul(self.mul(self.gelu(gate), up), share)
        together = self._columns(self.weights.tensors[down], stack=count)
        return g.op("MatMul", [self.reshape(h, [1, self.length, count * inner]), together])

    def _columns(self, tensor: Tensor, stack: int = 1) -> ir.Value:
        """A weight `[in, out]` in f32; of a tensor of three axes all rows, or, of a stack, `[stack * in, out]`."""
        if tensor.grid is not None:
            return self._dequantized(tensor, tensor.grid, stack)
        rows, width = matrix_of(tensor.shape)
        dtype, shape, turned = FLOATS[tensor.dtype], (stack * width, rows // stack), plain(tensor, turn=True)
        stored = self.weights.plan(tensor.name, "columns", dtype, shape, turned, file=WEIGHTS, columns=stack)
        return self.to_float(self._weight(tensor, stored), tensor.dtype)

    def _rounded(self, x: ir.Value, quantizer: Quantizer | None) -> ir.Value:
        """`x` through the quantizer's integers; projections that read the same one share it."""
        if quantizer is None:
            return x
        if (x, quantizer) not in self._roundings:
            self._roundings[x, quantizer] = self._real(self._integers(x, quantizer), quantizer)
        return self._roundings[x, quantizer]

    def _integers(self, x: ir.Value, quantizer: Quantizer) -> ir.Value:
        return self.graph.op("QuantizeLinear", [x, *self._parameters(quantizer)])

    def _real(self, x: ir.Value, quantizer: Quantizer) -> ir.Value:
        return self.graph.op("DequantizeLinear", [x, *self._parameters(quantizer)])

    def _parameters(self, quantizer: Quantizer) -> tuple[ir.Value, ir.Value]:
        zero = self.graph.constant(quantizer.zero_point, integer(quantizer).numpy())
        return self.number(quantizer.scale), zero

    def _weight(self, tensor: Tensor, stored: ir.ExternalTensor) -> ir.Value:
        """A weight of a linear; a tied head has a copy of its own: the lookup needs rows, and MatMul columns."""
        if tensor.name == EMBEDDING:
            return self.graph.external(HEAD, stored, metadata={COPY: EMBEDDING})
        shape = {} if len(tensor.shape) == 2 else {SHAPE: ",".join(map(str, tensor.shape))}
        return self.graph.external(tensor.name, stored, metadata=shape)

    def _dequantized(self, tensor: Tensor, grid: Grid, stack: int = 1) -> ir.Value:
        """A weight `[in, out]` out of its codes, with a scale a block of `in`, or a column where a row has but one.

        Two-bit rows are blocks too, as long as the row: ONNX Runtime 1.32 makes of a column's scale, between rounded
        activations, an operator that has no two-bit type.
        """
        rows, width = matrix_of(tensor.shape)
        out = rows // stack
        bits, signed = stored_bits(grid.bits, out), grid.kind == "symmetric"
        blocked = grid.block < width or bits == 2 or stack > 1
        shape = [stack * width // grid.block, out] if blocked else [out]

        def join(codes: NDArray[Any]) -> NDArray[np.uint8]:
            codes = np.ascontiguousarray(codes.T)
            return pack_signed(codes, bits) if signed else pack_unsigned(codes.view(np.uint8), bits)

        def plan(layout: str, kind: ir.DataType, size: list[int], fill: Convert) -> ir.ExternalTensor:
            return self.weights.plan(tensor.name, layout, kind, size, fill, file=WEIGHTS, columns=stack)

        def zeros(part: Rows) -> NDArray[np.uint8]:
            return join(np.zeros_like(part.grid()[1], np.uint8) if signed else zero_points(part, bits))

        kind = INTEGERS[bits, signed]
        weight = self._weight(tensor, plan("columns", kind, [stack * width, out], lambda part: join(part.grid()[0])))
        scales = plan("column scales", ir.DataType.FLOAT, shape, lambda part: part.grid()[1].T)
        inputs = [weight, self.graph.external(f"{weight.name}{SCALES}", scales)]
        if not signed or bits == 8:
            # ONNX Runtime 1.32 breaks its own graph where it makes INT8 weights unsigned that have no zero points.
            inputs.append(self.graph.external(f"{weight.name}{ZEROS}", plan("column zeros", kind, shape, zeros)))
        attributes: dict[str, Any] = {"axis": 0, "block_size": grid.block} if blocked else {"axis": 1}
        return self.graph.op("DequantizeLinear", inputs, **attributes)

    def _zeros(self, weight: ir.Value, bits: int, shape: list[int], tensor: str) -> ir.Value:
        """Zero points that are zero, of a weight of its own.

        ONNX Runtime 1.32, told to make signed 8-bit weights unsigned (session.x64quantprecision), breaks its own graph
        where there are none, and where two weights share them.
        """
        nothing = np.zeros(-(-int(np.prod(shape)) * bits // 8), np.uint8)
        stored = self.weights.plan(tensor, "column zeros", INTEGERS[bits, True], shape, nothing, file=WEIGHTS)
        return self.graph.external(f"{weight.name}{ZEROS}", stored)

    def rotary(self, x: ir.Value, layer: Layer) -> ir.Value:
        g = self.graph
        cos, sin = self._rotation(layer)
        half = layer.head_dim // 2
        a, b = g.ops("Split", 2, [x, g.constant([half, half], np.int64)], axis=-1)
        first = g.op("Sub", [self.mul(a, cos), self.mul(b, sin)])
        return g.op("Concat", [first, self.add(self.mul(b, cos), self.mul(a, sin))], axis=-1)

    def _rotation(self, layer: Layer) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines `[1, n, 1, head_dim / 2]` out of tables: f16 could not compute the angles."""
        key = (layer.rope, layer.head_dim)
        if key not in self._rotations:
            g, number = self.graph, len(self._rotations)
            # In f32 as the reference has them: a rounding of the frequency grows with the position.
            frequencies = layer.rope.inv_freq(layer.head_dim).astype(np.float32)
            angles = np.arange(self.context, dtype=np.float32)[:, None] * frequencies
            here = g.op("Max", [self.positions(), g.constant(0, np.int32)])
            named = zip(("cos", "sin"), self._rope_tables(np.cos(angles), np.sin(angles)), strict=True)
            found = [self._rope_rows(f"/rope_{number}/{kind}", values, here) for kind, values in named]
            self._rotations[key] = found[0], found[1]
        return self._rotations[key]

    def _rope_tables(self, cosines: Floats, sines: Floats) -> tuple[Floats, Floats]:
        """Tables `[context, …]` as `rotary` takes them, of those of half a head."""
        return cosines, sines

    def _rope_rows(self, name: str, values: Floats, here: ir.Value) -> ir.Value:
        """The rows of a table at the positions `here`."""
        g = self.graph
        stored = self.weights.plan(name, "plain", ir.DataType.FLOAT, values.shape, values, file=WEIGHTS)
        rows = g.op("Gather", [g.external(name, stored), here], axis=0)
        return g.op("Unsqueeze", [rows, g.constant([2], np.int64)])

    def positions(self) -> ir.Value:
        """Positions `[1, n]`, consecutive; below zero where there is padding."""
        if self._positions is None:
            self._positions = self.graph.input("position_ids", ir.DataType.INT32, [1, self.length])
        return self._positions

    def cache_length(self, layer: Layer) -> int:
        """How many positions a layer's cache holds: no more than it can see."""
        return min(self.a.sliding_window, self.context) if layer.sliding else self.context

    def remember(self, k: ir.Value, v: ir.Value, layer: Layer) -> None:
        rounding = self.activations.caches.get(layer.index, CacheActivations())
        shape = [1, layer.kv_heads, self.cache_length(layer), layer.head_dim]
        name = f"{layer.index}.{{}}"
        key, value = (self.graph.op("Transpose", [new], perm=[0, 2, 1, 3]) for new in (k, v))
        self._cache[layer.index] = (
            self._appended(key, name.format("key"), shape, rounding.key),
            self._appended(value, name.format("value"), shape, rounding.value),
        )

    def _appended(self, new: ir.Value, name: str, shape: list[int], quantizer: Quantizer | None) -> ir.Value:
        """`new` behind what the cache holds; the last of it is the next cache, in integers where it has a scale."""
        g = self.graph
        dtype = ir.DataType.FLOAT if quantizer is None else integer(quantizer)
        past = g.input(f"past_key_values.{name}", dtype, shape)
        whole = g.op("Concat", [past, new if quantizer is None else self._integers(new, quantizer)], axis=2)
        ends = (g.constant([at], np.int64) for at in (self.length, self.length + shape[2], 2))
        g.output(g.op("Slice", [whole, *ends]), f"present.{name}", dtype, shape)
        return whole if quantizer is None else self._real(whole, quantizer)

    def attention(self, q: ir.Value, layer: Layer, scale: float, softcap: float | None) -> ir.Value:
        g, n = self.graph, self.length
        keys, values = self._cache[layer.kv_source]
        groups = self.a.heads // layer.kv_heads
        seen = self.cache_length(layer) + n
        # The heads of a group ask the same keys: as one longer query they need no copies of them.
        asked = self.scale(g.op("Transpose", [q], perm=[0, 2, 1, 3]), scale)
        asked = self.reshape(asked, [1, layer.kv_heads, groups * n, layer.head_dim])
        scores = g.op("MatMul", [asked, g.op("Transpose", [keys], perm=[0, 1, 3, 2])])
        scores = scores if softcap is None else self.softcap(scores, softcap)
        scores = self.add(self.reshape(scores, [layer.kv_heads, groups, n, seen]), self._bias(layer))
        shares = self.reshape(g.op("Softmax", [scores], axis=-1), [1, layer.kv_heads, groups * n, seen])
        read = self.reshape(g.op("MatMul", [shares, values]), [1, self.a.heads, n, layer.head_dim])
        return g.op("Transpose", [read], perm=[0, 2, 1, 3])

    def _bias(self, layer: Layer) -> ir.Value:
        """`[n, length + n]`: 0 where a query sees a key, MASKED elsewhere."""
        if layer.sliding not in self._biases:
            choice = [self._sees(layer), self.number(0.0), self.number(MASKED)]
            self._biases[layer.sliding] = self.graph.op("Where", choice)
        return self._biases[layer.sliding]

    def _sees(self, layer: Layer) -> ir.Value:
        """`[n, length + n]`: whether a query sees a key; both positions follow from the last one."""
        if layer.sliding not in self._visible:
            g, seen = self.graph, self.cache_length(layer) + self.length
            last = g.op("Gather", [self.positions(), g.constant([self.length - 1], np.int64)], axis=1)
            keys = g.op("Add", [last, g.constant(np.arange(1 - seen, 1)[None, :], np.int32)])
            zero = g.constant(0, np.int32)
            ago = g.op("Sub", [self.reshape(self.positions(), [self.length, 1]), keys])
            sees = g.op("And", [g.op("GreaterOrEqual", [keys, zero]), g.op("GreaterOrEqual", [ago, zero])])
            if layer.sliding:
                near = g.op("Less", [ago, g.constant(self.a.sliding_window, np.int32)])
                sees = g.op("And", [sees, near])
            self._visible[layer.sliding] = sees
        return self._visible[layer.sliding]


def lookup(a: Architecture, graph: GraphBuilder, weights: Weights) -> GraphBuilder:
    """The graph that turns ids into `inputs_embeds` and `per_layer_inputs`, of any length."""
    x, tokens = decoder.embed(a, NpuBackend(a, graph, weights, 1, 1))
    graph.output(x, "inputs_embeds", ir.DataType.FLOAT, [1, "sequence_length", a.hidden_size])
    if tokens is not None and a.per_layer is not None:
        width = len(a.layers) * a.per_layer.dim
        graph.output(tokens, "per_layer_inputs", ir.DataType.FLOAT, [1, "sequence_length", width])
    return graph


def add_decoder(backend: NpuBackend) -> GraphBuilder:
    """The graph of `backend` with the decoder in it, from what was looked up to the logits."""
    a, graph = backend.a, backend.graph
    logits = decoder.head(a, backend, decoder.layers(a, backend, *backend.embedded()))
    graph.output(logits, "logits", ir.DataType.FLOAT, [1, backend.length, a.vocab_size])
    return graph


def plain(tensor: Tensor, turn: bool = False) -> Convert:
    """How rows of a tensor without a grid are stored: in its own dtype, as columns if turned."""

    def convert(rows: Rows) -> NDArray[Any]:
        stored = stored_floats(rows.values, tensor.dtype)
        return stored.T if turn else stored

    return convert
