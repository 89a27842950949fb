"""The decoder's operations spelled in MIL, Core ML's intermediate language (iOS 18), through coremltools' builder.

What may overflow float16 stays in float32: the residual stream and the norms. Matrices multiply, and attention runs,
in the compute type. Keys and values live in states, `[layers, 1, kv_heads, context, head_dim]` float16, one pair for
each shape of layer, updated as Apple's own stateful language models do it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

from gemexport.exporters.coreml.constants import Matrix, Sum, matrix, vectors
from gemexport.exporters.coreml.quantize import Integer, rounded
from gemexport.exporters.coreml.weights import Sources, placeholder
from gemexport.formats.activations import Activations, CacheActivations, Quantizer
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.coreml import stored_name
from gemexport.formats.coreml.activations import cache_name
from gemexport.formats.gemma.architecture import Architecture, Layer
from gemexport.formats.gemma.names import EMBEDDING, HEAD, role_of
from gemexport.formats.gemma.roles import Kind
from gemexport.formats.tensor import Floats

INPUT_IDS, LOGITS = "inputIds", "logits"
FULL_MASK, SLIDING_MASK = "fullAttentionMask", "slidingAttentionMask"
F16_MAX = 65504
Var = Any

# What is not normed may be large (the residual): a power of two, exact both ways, brings it into float16's range.
HEADROOM = 2.0**-8
LEAST = 1e-5  # mean square of a stream, see `Backend.as_large`


@dataclass(frozen=True)
class Cache:
    """A pair of states and the layers whose keys and values they hold, in order."""

    key: str
    value: str
    layers: tuple[int, ...]
    shape: tuple[int, int, int, int, int]


def caches(architecture: Architecture, context: int) -> list[Cache]:
    """The states of a decoder: one pair for each (kv_heads, head_dim) that occurs, in order of the first layer."""
    groups: dict[tuple[int, int], list[int]] = {}
    for layer in architecture.layers:
        if layer.owns_cache:
            groups.setdefault((layer.kv_heads, layer.head_dim), []).append(layer.index)
    found = []
    for i, ((kv_heads, head_dim), layers) in enumerate(groups.items()):
        end = "" if i == 0 else str(i + 1)
        shape = (len(layers), 1, kv_heads, context, head_dim)
        found.append(Cache(f"keyCache{end}", f"valueCache{end}", tuple(layers), shape))
    return found


class MILBackend:
    """Spells the decoder's operations; made inside the function that it adds them to."""

    def __init__(self, checkpoint: Checkpoint, inputs: dict[str, Var], sources: Sources, context: int) -> None:
        self._architecture, self._tensors = checkpoint.architecture, checkpoint.tensors
        self._activations = checkpoint.activations or Activations()
        self._inputs, self._sources, self._context = inputs, sources, context
        self._compute = "fp32" if sources.variant == "f32" else "fp16"
        self._weights: dict[str, Matrix] = {}
        self._shared: dict[Any, Any] = {}
        self._count = 0
        self._normed: set[str] = set()
        self._caches = caches(self._architecture, context)
        # A mask's shape, [1, 1, n, end], says where the tokens at hand are.
        mask = inputs[next(name for name in (FULL_MASK, SLIDING_MASK) if name in inputs)]
        shape = mb.shape(x=mask, name="mask_shape")
        n = mb.slice_by_index(x=shape, begin=[2], end=[3], name="token_count")
        self._end = mb.slice_by_index(x=shape, begin=[3], end=[4], name="end_position")
        self._past = mb.sub(x=self._end, y=n, name="past_position")

    # Names are given, not counted by coremltools, whose counters are the process's: the same input, the same bytes.
    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}_{self._count}"

    def _cast(self, x: Var, dtype: str) -> Var:
        return x if types.builtin_to_string(x.dtype) == dtype else mb.cast(x=x, dtype=dtype, name=self._name("cast"))

    def _number(self, value: float, like: Var) -> Any:
        return np.float16(value) if like.dtype == types.fp16 else np.float32(value)

    def _weight(self, name: str) -> Matrix:
        """A 2-D weight; one constant however many read it."""
        if name not in self._weights:
            self._weights[name] = matrix(self._tensors[name], self._sources)
        return self._weights[name]

    def embedding(self, weight: str, scale: float) -> Var:
        tensor = self._tensors[weight]
        if tensor.grid is not None and tensor.grid.kind == "vectors" and self._sources.variant == "int4":
            return self.scale(self._vectors(vectors(tensor, tensor.grid, self._sources), tensor.shape[0]), scale)
        table, ids = self._weight(weight), self._ids(tensor.shape[0])
        rows = self._cast(mb.gather(x=table.weight, indices=ids, axis=0, name=self._name("gather")), "fp32")
        if table.biases is not None:
            width = rows.shape[-1]
            biases = mb.gather(x=table.biases, indices=ids, axis=0, name=self._name("gather"))
            biases = self._reshape(self._cast(biases, "fp32"), (1, -1, width // table.block, 1))
            rows = self.merge(self.add(self._reshape(rows, (1, -1, width // table.block, table.block)), biases))
        return self.scale(rows, scale)

    def _ids(self, rows: int) -> Var:
        """The input ids; of a table of fewer rows than the vocabulary the first one's for those that it has not."""
        ids = self._inputs[INPUT_IDS]
        if rows >= self._architecture.vocab_size:
            return ids
        if ("ids", rows) not in self._shared:
            there = self._cast(mb.less(x=ids, y=np.int32(rows), name=self._name("there")), "int32")
            self._shared["ids", rows] = mb.mul(x=ids, y=there, name=self._name("ids"))
        return self._shared["ids", rows]

    def _vectors(self, table: Sum, rows: int) -> Var:
        """Rows of a matrix of so many in the vector codec at the ids, added and scaled in float32."""
        ids = self._ids(rows)
        found = [
            self._cast(mb.gather(x=x, indices=ids, axis=0, name=self._name("gather")), "fp32")
            for x in (*table.parts, table.scales)
        ]
        total, scales = found[0], found[-1]
        for part in found[1:-1]:
            total = self.add(total, part)
        blocks = scales.shape[-1]
        wide = self._reshape(total, (1, -1, blocks, table.block))
        return self.merge(self.mul(wide, self._reshape(scales, (1, -1, blocks, 1))))

    def linear(self, x: Var, weight: str) -> Var:
        # A tied head has scales of its own.
        around = self._activations.linear(HEAD if weight == EMBEDDING else weight)
        name = stored_name(weight).removesuffix("_weight")
        y = self._product(self._rounded(x, around.input, f"{name}_input"), weight)
        return self._rounded(y, around.output, f"{name}_output")

    def _rounded(self, x: Var, quantizer: Quantizer | None, name: str) -> Var:
        """`x` by the quantizer's integers, float32; what reads the same values by the same integers shares them."""
        if quantizer is None:
            return x
        key = ("rounded", x.name, quantizer)
        if key not in self._shared:
            kind: Integer = "int8" if quantizer.signed else "uint8"
            self._shared[key] = rounded(x, quantizer.scale, name, quantizer.zero_point, kind)
            if 255 * quantizer.scale < F16_MAX:
                self._normed.add(name)
        return self._shared[key]

    def _product(self, x: Var, weight: str) -> Var:
        stored = self._weight(weight)
        # Scores that float16 rounds choose other experts; and what mixes streams multiplies all of them.
        role = role_of(weight)
        small = role is not None and role.kind in (Kind.ROUTER, Kind.MIXER)
        compute = "fp32" if small else self._compute
        # Large and small by turns: only what a norm gave is known to fit float16 as it is.
        wild = compute == "fp16" and x.dtype == types.fp32 and x.name not in self._normed
        part = self.scale(x, HEADROOM) if wild else x
        name = stored_name(weight).removesuffix("_weight") + "_linear"
        y = self._times(self._cast(part, compute), stored.weight, name)
        y = self.scale(self._cast(y, "fp32"), 1 / HEADROOM) if wild else y
        if stored.biases is None:
            return y
        return self.add(y, self._times(self._block_sums(x, stored), stored.biases, f"{name}_biases"))

    def _block_sums(self, x: Var, matrix: Matrix) -> Var:
        """`[…, in // block]`: what the bias of a block, the same for all its weights, is multiplied with."""
        blocks = self._reshape(self._cast(x, "fp32"), (*x.shape[:1], -1, x.shape[-1] // matrix.block, matrix.block))
        return mb.reduce_sum(x=blocks, axes=[-1], keep_dims=False, name=self._name("sums"))

    def experts(self, x: Var, ids: Var, shares: Var, gate_up: str, down: str) -> Var:
        """Every expert computes, and those that were not chosen have a share of nought.

        A program that looked matrices up would have Core ML unpack all of them first.
        """
        count, _, inner = self._tensors[down].shape
        hot = mb.one_hot(indices=ids, one_hot_vector_size=count, axis=-1, on_value=1.0, off_value=0.0,
                         name=self._name("chosen"))  # fmt: skip
        # [1, n, k] times [1, n, k, experts], over k: [experts, n, 1].
        parts = self.mul(hot, mb.expand_dims(x=shares, axes=[-1], name=self._name("shares")))
        share = mb.reduce_sum(x=parts, axes=[2], keep_dims=False, name=self._name("share"))
        share = mb.transpose(x=share, perm=[2, 1, 0], name=self._name("transpose"))
        h = self._stacked(x, gate_up)
        gate, up = mb.split(x=h, split_sizes=[inner, inner], axis=-1, name=self._name("halves"))
        h = self._stacked(self.mul(self.gelu(gate), up), down)
        return mb.reduce_sum(x=self.mul(h, share), axes=[0], keep_dims=True, name=self._name("sum"))

    def _stacked(self, x: Var, weight: str) -> Var:
        """`x` `[1 or experts, n, in]` times the transpose of each matrix of a stack: `[experts, n, out]`, float32."""
        stored, name = self._weight(weight), stored_name(weight)
        # matmul, unlike linear, wants both of one type.
        dtype = types.builtin_to_string(stored.weight.dtype)
        wild = dtype == "fp16" and x.name not in self._normed
        part = self._cast(self.scale(x, HEADROOM) if wild else x, dtype)
        y = self._cast(mb.matmul(x=part, y=stored.weight, transpose_y=True, name=f"{name}_product"), "fp32")
        y = self.scale(y, 1 / HEADROOM) if wild else y
        if stored.biases is None:
            return y
        sums = self._cast(self._block_sums(x, stored), types.builtin_to_string(stored.biases.dtype))
        return self.add(y, mb.matmul(x=sums, y=stored.biases, transpose_y=True, name=f"{name}_biases_product"))

    def _times(self, x: Var, weight: Var, name: str) -> Var:
        """x times the transpose of `weight`, in the type of x; since iOS 17 the weight may have another."""
        # MIL's linear has a bias always; one of zeros serves all matrices of that height.
        key = ("zeros", weight.shape[0], types.builtin_to_string(weight.dtype))
        if key not in self._shared:
            zeros = np.zeros(key[1], types.nptype_from_builtin(weight.dtype))
            self._shared[key] = mb.const(val=zeros, name=f"zeros_{key[1]}_{key[2]}")
        return mb.linear(x=x, weight=weight, bias=self._shared[key], name=name)

    def rms_norm(self, x: Var, weight: str | None, eps: float, offset: float) -> Var:
        x = self._cast(x, "fp32")
        square = mb.square(x=x, name=self._name("square"))
        mean = mb.reduce_mean(x=square, axes=[-1], keep_dims=True, name=self._name("mean"))
        inverse = mb.rsqrt(x=mean, epsilon=np.float32(eps), name=self._name("rsqrt"))
        y = self.mul(x, inverse)
        if weight is not None:
            values = self._tensors[weight].numpy() + np.float32(offset)
            y = self.mul(y, mb.const(val=values, name=stored_name(weight)))
        self._normed.add(y.name)
        return y

    def split(self, x: Var, parts: int) -> Var:
        return self._reshape(x, (1, -1, parts, x.shape[-1] // parts))

    def merge(self, x: Var) -> Var:
        return self._reshape(x, (1, -1, x.shape[-2] * x.shape[-1]))

    def _reshape(self, x: Var, shape: tuple[int, ...]) -> Var:
        y = mb.reshape(x=x, shape=[int(size) for size in shape], name=self._name("reshape"))
        if x.name in self._normed:
            self._normed.add(y.name)
        return y

    def part(self, x: Var, index: int) -> Var:
        return mb.slice_by_index(
            x=x,
            begin=[0, 0, index, 0],
            end=[0, 0, index + 1, 0],
            begin_mask=[True, True, False, True],
            end_mask=[True, True, False, True],
            squeeze_mask=[False, False, True, False],
            name=self._name("part"),
        )

    def rotary(self, x: Var, layer: Layer) -> Var:
        cos, sin = self._rotation(layer)
        x, half = self._cast(x, "fp32"), layer.head_dim // 2
        keep = [True, True, True]
        low = mb.slice_by_index(
            x=x, begin=[0] * 4, end=[0, 0, 0, half], end_mask=[*keep, False], begin_mask=[*keep, True],
            name=self._name("low"),
        )  # fmt: skip
        high = mb.slice_by_index(
            x=x, begin=[0, 0, 0, half], end=[0] * 4, begin_mask=[*keep, False], end_mask=[*keep, True],
            name=self._name("high"),
        )  # fmt: skip
        swapped = mb.concat(values=[high, low], axis=-1, name=self._name("swapped"))
        return self.add(self.mul(x, cos), self.mul(swapped, sin))

    def _rotation(self, layer: Layer) -> tuple[Var, Var]:
        """cos, and sin negative in its first half, `[1, n, 1, head_dim]`, for the positions at hand.

        Angles are products in float32, as transformers computes them; their tables have a row a position.
        """
        key = ("rope", layer.rope, layer.head_dim)
        if key not in self._shared:
            frequencies = layer.rope.inv_freq(layer.head_dim).astype(np.float32)
            shape = (self._context, layer.head_dim // 2)

            def angles(start: int, stop: int) -> Floats:
                positions = np.arange(start, stop, dtype=np.float32)
                return np.asarray(positions[:, None] * frequencies, np.float32)

            name = f"rope_{sum('rope' in str(k) for k in self._shared)}"
            self._sources.array(f"{name}_cos", shape, lambda i, j: np.cos(angles(i, j).astype(np.float64)))
            self._sources.array(f"{name}_sin", shape, lambda i, j: np.sin(angles(i, j).astype(np.float64)))
            cos, sin = (self._positions(f"{name}_{f}", shape) for f in ("cos", "sin"))
            minus = mb.mul(x=sin, y=np.float32(-1), name=f"{name}_minus")
            whole = (
                mb.concat(values=[cos, cos], axis=-1, name=f"{name}_cos_whole"),
                mb.concat(values=[minus, sin], axis=-1, name=f"{name}_sin_whole"),
            )
            self._shared[key] = whole
        found: tuple[Var, Var] = self._shared[key]
        return found

    def _positions(self, name: str, shape: tuple[int, int]) -> Var:
        """The rows past to end of a table, `[1, n, 1, columns]`."""
        table = mb.const(val=placeholder(shape, np.float32), name=name)
        rows = mb.slice_by_index(
            x=table,
            begin=mb.concat(values=[self._past, [0]], axis=0, name=f"{name}_begin"),
            end=mb.concat(values=[self._end, [0]], axis=0, name=f"{name}_end"),
            begin_mask=[False, True],
            end_mask=[False, True],
            name=f"{name}_rows",
        )
        return self._reshape(rows, (1, -1, 1, shape[1]))

    def _slot(self, layer: Layer) -> tuple[Cache, int]:
        cache = next(cache for cache in self._caches if layer.kv_source in cache.layers)
        return cache, cache.layers.index(layer.kv_source)

    def remember(self, k: Var, v: Var, layer: Layer) -> None:
        cache, slot = self._slot(layer)
        begin = mb.concat(values=[[slot, 0, 0], self._past, [0]], axis=0, name=self._name("begin"))
        end = mb.concat(values=[[slot + 1, 0, 0], self._end, [0]], axis=0, name=self._name("end"))
        rounding = self._activations.caches.get(layer.index, CacheActivations())
        k = self._rounded(k, rounding.key, cache_name(layer.index, "key"))
        v = self._rounded(v, rounding.value, cache_name(layer.index, "value"))
        for what, state, x in (("keys", cache.key, k), ("values", cache.value, v)):
            turned = mb.transpose(x=self._cast(x, "fp16"), perm=[0, 2, 1, 3], name=self._name("transpose"))
            held = mb.read_state(input=self._inputs[state], name=self._name("read"))
            updated = mb.slice_update(
                x=held,
                update=turned,
                begin=begin,
                end=end,
                begin_mask=[False, True, True, False, True],
                end_mask=[False, True, True, False, True],
                squeeze_mask=[True, False, False, False, False],
                name=self._name("updated"),
            )
            after = mb.coreml_update_state(state=self._inputs[state], value=updated, name=self._name("state"))
            self._shared[what, layer.index] = self._seen(after, slot)

    def _seen(self, state: Var, slot: int) -> Var:
        """`[1, kv_heads, end, head_dim]`: one layer's part of a state, up to the last token."""
        part = mb.slice_by_index(
            x=state,
            begin=[slot, 0, 0, 0, 0],
            end=mb.concat(values=[[slot + 1, 0, 0], self._end, [0]], axis=0, name=self._name("end")),
            begin_mask=[False, True, True, True, True],
            end_mask=[False, True, True, False, True],
            squeeze_mask=[True, False, False, False, False],
            name=self._name("seen"),
        )
        return self._cast(part, self._compute)

    def attention(self, q: Var, layer: Layer, scale: float, softcap: float | None) -> Var:
        keys, values = self._shared["keys", layer.kv_source], self._shared["values", layer.kv_source]
        heads, size = self._architecture.heads, layer.head_dim
        group = heads // layer.kv_heads
        # Queries that share keys lie one after the other along the positions, so that no key is copied.
        q = self._cast(self.scale(q, scale * math.sqrt(size)), self._compute)
        q = mb.transpose(
            x=self._reshape(q, (-1, layer.kv_heads, group, size)), perm=[1, 2, 0, 3], name=self._name("transpose")
        )
        q = self._reshape(q, (1, layer.kv_heads, -1, size))
        mask = self._mask(layer, group)
        if softcap is None:
            h = mb.scaled_dot_product_attention(
                query=q, key=keys, value=values, attn_mask=mask, name=self._name("attention")
            )
        else:
            q = self.scale(q, 1 / math.sqrt(size))
            scores = self.softcap(mb.matmul(x=q, y=keys, transpose_y=True, name=self._name("scores")), softcap)
            weights = mb.softmax(x=self.add(scores, mask), axis=-1, name=self._name("softmax"))
            h = mb.matmul(x=weights, y=values, name=self._name("attention"))
        h = self._reshape(h, (layer.kv_heads, group, -1, size))
        h = mb.transpose(x=h, perm=[2, 0, 1, 3], name=self._name("transpose"))
        return self._reshape(h, (1, -1, heads, size))

    def _mask(self, layer: Layer, group: int) -> Var:
        """The additive mask `[1, 1, group * n, end]`, repeated for the queries that share keys."""
        name = SLIDING_MASK if layer.sliding else FULL_MASK
        if ("mask", name, group) not in self._shared:
            mask = self._cast(self._inputs[name], self._compute)
            if group > 1:
                mask = mb.tile(x=mask, reps=[1, 1, group, 1], name=self._name("mask"))
            self._shared["mask", name, group] = mask
        return self._shared["mask", name, group]

    def constant(self, weight: str) -> Var:
        return mb.const(val=self._tensors[weight].numpy().astype(np.float32), name=stored_name(weight))

    def gelu(self, x: Var) -> Var:
        return mb.gelu(x=x, mode="TANH_APPROXIMATION", name=self._name("gelu"))

    def _alike(self, a: Var, b: Var) -> tuple[Var, Var]:
        """Both in the wider type of the two."""
        dtype = "fp32" if types.fp32 in (a.dtype, b.dtype) else "fp16"
        return self._cast(a, dtype), self._cast(b, dtype)

    def add(self, a: Var, b: Var) -> Var:
        a, b = self._alike(a, b)
        return mb.add(x=a, y=b, name=self._name("add"))

    def mul(self, a: Var, b: Var) -> Var:
        a, b = self._alike(a, b)
        return mb.mul(x=a, y=b, name=self._name("mul"))

    def scale(self, x: Var, factor: float) -> Var:
        return x if factor == 1 else mb.mul(x=x, y=self._number(factor, x), name=self._name("scale"))

    def above(self, x: Var, deviations: float) -> Var:
        x = self._cast(x, "fp32")
        centred = mb.sub(x=x, y=self._mean(x), name=self._name("centred"))
        least = self.scale(mb.sqrt(x=self._mean(self.mul(centred, centred)), name=self._name("sqrt")), deviations)
        return mb.relu(x=mb.sub(x=centred, y=least, name=self._name("above")), name=self._name("relu"))

    def as_large(self, x: Var, like: Var) -> Var:
        x, like = self._cast(x, "fp32"), self._cast(like, "fp32")
        have = mb.maximum(x=self._mean(self.mul(x, x)), y=np.float32(LEAST), name=self._name("maximum"))
        share = mb.real_div(x=self._mean(self.mul(like, like)), y=have, name=self._name("share"))
        return self.mul(x, mb.sqrt(x=share, name=self._name("sqrt")))

    def _mean(self, x: Var) -> Var:
        """`[…, 1]`: the mean of the last axis."""
        return mb.reduce_mean(x=x, axes=[-1], keep_dims=True, name=self._name("mean"))

    def softmax(self, x: Var) -> Var:
        return mb.softmax(x=x, axis=-1, name=self._name("softmax"))

    def best(self, x: Var, k: int) -> tuple[Var, Var]:
        values, ids = mb.topk(x=x, k=k, axis=-1, name=self._name("best"))
        return values, ids

    def take(self, weight: str, ids: Var) -> Var:
        return mb.gather(x=self.constant(weight), indices=ids, axis=0, name=self._name("gather"))

    def softcap(self, x: Var, cap: float) -> Var:
        return self.scale(mb.tanh(x=self.scale(x, 1 / cap), name=self._name("tanh")), cap)
