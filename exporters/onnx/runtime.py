"""The decoder in ONNX Runtime's own operators: packed weights stay packed, and attention keeps its cache itself.

Sizes are free (batch, length, past), inputs and outputs are named as onnxruntime-genai wants them, and everything is
computed in f32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gemexport.exporters.onnx.additive import additive_rows
from gemexport.exporters.onnx.common import StandardOperations, packed_codes, stored_bits, zero_points
from gemexport.exporters.onnx.graph import FLOATS, Convert, GraphBuilder, Weights, stored_floats
from gemexport.formats.gemma.architecture import Architecture, Layer, Rope
from gemexport.formats.gemma.names import EMBEDDING, HEAD
from gemexport.formats.onnx import SCALES, ZEROS
from gemexport.formats.onnx.blocks import pack_unsigned
from gemexport.formats.tensor import Grid, Rows, Tensor, reblock

MICROSOFT = "com.microsoft"
WEIGHTS = "model.onnx.data"
BLOCKS = (128, 64, 32, 16)  # what MatMulNBits has kernels for, and GatherBlockQuantized accepts


def block_of(grid: Grid) -> int | None:
    """The largest block of ONNX Runtime's operators that holds the grid's scales, repeated; None when none does."""
    return next((block for block in BLOCKS if grid.block % block == 0), None)


class OnnxRuntimeBackend(StandardOperations):
    """`decoder.Backend` in the operators of com.microsoft; weights with a grid packed where `quantized`."""

    def __init__(self, a: Architecture, graph: GraphBuilder, weights: Weights, quantized: bool) -> None:
        super().__init__(graph, weights, WEIGHTS)
        self.a, self.quantized = a, quantized
        self.ids = graph.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        mask = graph.input("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        self.positions = graph.input("position_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        one = graph.constant([1], np.int64)
        seen = graph.op("Sub", [graph.op("ReduceSum", [mask, one], keepdims=0), one])
        self.last = self.cast(seen, ir.DataType.INT32)
        total = graph.op("Gather", [graph.op("Shape", [mask]), graph.constant(1, np.int64)], axis=0)
        self.total = self.cast(total, ir.DataType.INT32)
        self.order = self._order()
        self._angles: dict[tuple[Rope, int], tuple[ir.Value, ir.Value]] = {}
        self._new: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._cache: dict[int, tuple[ir.Value, ir.Value]] = {}

    def embedding(self, weight: str, scale: float) -> ir.Value:
        tensor = self.weights.tensors[weight]
        ids = self.known(self.ids, tensor, self.a.vocab_size)
        if self.quantized and tensor.grid is not None and tensor.grid.kind == "vectors":
            return self.scale(additive_rows(self.graph, self.weights, tensor, ids, WEIGHTS), scale)
        return self.scale(self._lookup(tensor)(ids), scale)

    def _lookup(self, tensor: Tensor) -> Callable[[ir.Value], ir.Value]:
        """What gives the parts of a tensor at ids along its first axis, in f32: rows, of experts whole matrices."""
        block = self._block(tensor)
        if block is None:
            values = self._plain(tensor)
            return lambda ids: self.to_float(self.graph.op("Gather", [values, ids], axis=0), tensor.dtype)
        assert tensor.grid is not None
        codes, *factors = self._packed(tensor, block, tensor.name)
        attributes: dict[str, Any] = {
            "bits": stored_bits(tensor.grid.bits, tensor.shape[-1]),
            "block_size": block,
            "gather_axis": 0,
            "quantize_axis": len(tensor.shape) - 1,
        }
        return lambda ids: self.graph.op("GatherBlockQuantized", [codes, ids, *factors], MICROSOFT, **attributes)

    def linear(self, x: ir.Value, weight: str) -> ir.Value:
        tensor = self.weights.tensors[weight]
        block = self._block(tensor)
        if block is None:
            return self._times(x, self.to_float(self._plain(tensor), tensor.dtype))
        assert tensor.grid is not None
        out, width = tensor.shape
        # The embedding's bytes serve as the tied head under another shape.
        bits = stored_bits(tensor.grid.bits, width)
        shape = [out, width // block, block * bits // 8]
        packed = self._packed(tensor, block, HEAD if weight == EMBEDDING else weight, shape)
        sizes: dict[str, Any] = {"N": out, "K": width, "bits": bits, "block_size": block}
        return self.graph.op("MatMulNBits", [x, *packed], MICROSOFT, **sizes, accuracy_level=1)

    def experts(self, x: ir.Value, ids: ir.Value, shares: ir.Value, gate_up: str, down: str) -> ir.Value:
        """One expert after the other, of those that some position chose; no more than one is unpacked at a time."""
        g = self.graph
        first, second = (self._lookup(self.weights.tensors[name]) for name in (gate_up, down))
        rows, ids, shares = (g.op("Flatten", [value], axis=-1) for value in (x, ids, shares))
        asked = g.op("Unique", [self.reshape(ids, [-1])])

        def add_one(turn: ir.Value, total: ir.Value) -> ir.Value:
            expert = g.op("Gather", [asked, turn], axis=0)
            places = g.op("Transpose", [g.op("NonZero", [g.op("Equal", [ids, expert])])], perm=[1, 0])
            share = g.op("Unsqueeze", [g.op("GatherND", [shares, places]), g.constant([1], np.int64)])
            where = g.op("Gather", [places, g.constant([0], np.int64)], axis=1)
            h = self._times(g.op("GatherND", [rows, where]), first(expert))
            gate, up = g.ops("Split", 2, [h], axis=-1, num_outputs=2)
            h = self._times(self.mul(self.gelu(gate), up), second(expert))
            # No position chooses an expert twice, so no row is added to twice.
            return g.op("ScatterND", [total, where, self.mul(h, share)], reduction="add")

        nothing = g.op("Expand", [self.number(0.0), g.op("Shape", [rows])])
        total = g.repeat(g.op("Size", [asked]), nothing, add_one)
        return g.op("Reshape", [total, g.op("Shape", [x])])

    def _times(self, x: ir.Value, matrix: ir.Value) -> ir.Value:
        return self.graph.op("FusedMatMul", [x, matrix], MICROSOFT, transB=1)

    def rotary(self, x: ir.Value, layer: Layer) -> ir.Value:
        cos, sin = self._rotation(layer)
        heads = self.graph.op("RotaryEmbedding", [self.merge(x), self.order, cos, sin], MICROSOFT)
        return self.reshape(heads, [0, 0, -1, layer.head_dim])

    def _order(self) -> ir.Value:
        """0, 1, 2 … in the shape of the positions: which row of the cosines belongs to each."""
        g = self.graph
        steps = g.op("Range", [g.constant(0, np.int64), g.op("Size", [self.positions]), g.constant(1, np.int64)])
        return g.op("Reshape", [steps, g.op("Shape", [self.positions])])

    def _rotation(self, layer: Layer) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines `[batch * n, head_dim / 2]` of these positions alone: a table of all would be large."""
        key = (layer.rope, layer.head_dim)
        if key not in self._angles:
            frequencies = layer.rope.inv_freq(layer.head_dim).astype(np.float32)[None, :]
            name = f"/rope_{len(self._angles)}/inv_freq"
            row = self.graph.initializer(name, ir.Tensor(frequencies, name=name))
            angles = self.mul(self.cast(self.reshape(self.positions, [-1, 1]), ir.DataType.FLOAT), row)
            self._angles[key] = self.graph.op("Cos", [angles]), self.graph.op("Sin", [angles])
        return self._angles[key]

    def remember(self, k: ir.Value, v: ir.Value, layer: Layer) -> None:
        self._new[layer.index] = self.merge(k), self.merge(v)

    def attention(self, q: ir.Value, layer: Layer, scale: float, softcap: float | None) -> ir.Value:
        query = self.merge(q)
        attributes: dict[str, Any] = {
            "num_heads": self.a.heads,
            "kv_num_heads": layer.kv_heads,
            "scale": scale,
            "softcap": softcap or 0.0,
            "local_window_size": self.a.sliding_window if layer.sliding else -1,
        }
        if layer.owns_cache:
            inputs = [query, *self._new[layer.index], *self._past(layer), self.last, self.total]
            read, key, value = self.graph.ops("GroupQueryAttention", 3, inputs, MICROSOFT, **attributes)
            self._present(layer, key, value)
        else:
            # No new keys or values: this layer only reads what its donor has cached.
            nothing = self._nothing(query, layer.kv_heads * layer.head_dim)
            inputs = [query, nothing, nothing, *self._cache[layer.kv_source], self.last, self.total]
            read = self.graph.op("GroupQueryAttention", inputs, MICROSOFT, **attributes)
        return self.split(read, self.a.heads)

    def _past(self, layer: Layer) -> tuple[ir.Value, ir.Value]:
        shape: list[int | str] = ["batch_size", layer.kv_heads, "past_sequence_length", layer.head_dim]
        names = (f"past_key_values.{layer.index}.{kind}" for kind in ("key", "value"))
        key, value = (self.graph.input(name, ir.DataType.FLOAT, shape) for name in names)
        return key, value

    def _present(self, layer: Layer, key: ir.Value, value: ir.Value) -> None:
        shape: list[int | str] = ["batch_size", layer.kv_heads, "total_sequence_length", layer.head_dim]
        self.graph.output(key, f"present.{layer.index}.key", ir.DataType.FLOAT, shape)
        self.graph.output(value, f"present.{layer.index}.value", ir.DataType.FLOAT, shape)
        self._cache[layer.index] = key, value

    def _nothing(self, like: ir.Value, width: int) -> ir.Value:
        """No rows of `width`: `[batch, 0, width]`."""
        starts, ends, axes = (self.graph.constant(pair, np.int64) for pair in ([0, 0], [0, width], [1, 2]))
        return self.graph.op("Slice", [like, starts, ends, axes])

    def _block(self, tensor: Tensor) -> int | None:
        return block_of(tensor.grid) if self.quantized and tensor.grid is not None else None

    def _plain(self, tensor: Tensor) -> ir.Value:
        """A weight without a grid, in the dtype it came in."""

        def convert(rows: Rows) -> NDArray[Any]:
            return stored_floats(rows.values, tensor.dtype)

        stored = self.weights.plan(tensor.name, "plain", FLOATS[tensor.dtype], tensor.shape, convert, file=WEIGHTS)
        return self.graph.external(tensor.name, stored)

    def _packed(self, tensor: Tensor, block: int, name: str, shape: list[int] | None = None) -> list[ir.Value]:
        """Of a weight on a grid: codes, under `name` and in `shape`, scales as f32, and zero points if it has any."""
        grid = tensor.grid
        assert grid is not None
        source_block, dtype = grid.block, grid.scale_dtype
        *leading, width = tensor.shape
        blocks, bits = width // block, stored_bits(grid.bits, width)

        def scales(rows: Rows) -> NDArray[Any]:
            return stored_floats(repeated(rows.grid()[1], source_block, block), dtype)

        def zeros(rows: Rows) -> NDArray[Any]:
            return pack_unsigned(repeated(zero_points(rows, bits), source_block, block), bits)

        def plan(layout: str, kind: ir.DataType, size: int, fill: Convert) -> ir.ExternalTensor:
            return self.weights.plan(tensor.name, layout, kind, [*leading, size], fill, file=WEIGHTS)

        codes = plan("codes", ir.DataType.UINT8, width * bits // 8, lambda rows: packed_codes(rows, bits))
        factors = self.graph.external(f"{tensor.name}{SCALES}", plan("scales", FLOATS[dtype], blocks, scales))
        found = [self.graph.external(name, codes, shape), self.to_float(factors, dtype)]
        if grid.kind == "zero-point":
            shifts = plan("zero points", ir.DataType.UINT8, -(-blocks * bits // 8), zeros)
            found.append(self.graph.external(f"{tensor.name}{ZEROS}", shifts))
        return found


def repeated(array: NDArray[Any], block: int, target: int) -> NDArray[Any]:
    """Scales or zero points of blocks of `block` weights for the smaller ones of `target`."""
    found = reblock(array, block, target)
    assert found is not None
    return found
