"""The text decoder of Gemma 1 to 4 and 3n, written once over a small set of operations.

ONNX and Core ML need a graph: each gives a `Backend` that spells these operations in its own
operators, and calling `logits(architecture, backend)` makes the graph. A backend that computes
(PyTorch, in the tests) makes the model itself, which is how this description is held to
transformers' `modeling_gemma3.py`, `modeling_gemma4.py` and their like.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from gemexport.formats.gemma.architecture import GATHERINGS, SPREADS
from gemexport.formats.gemma.names import CANONICAL
from gemexport.formats.gemma.roles import Role

if TYPE_CHECKING:
    from gemexport.formats.gemma.architecture import Architecture, Layer
    from gemexport.formats.gemma.embedder import Embedder

V = TypeVar("V")
name = CANONICAL.name


class Backend(Protocol[V]):
    """The operations the decoder is made of; `V` is a value of the graph.

    Every value is `[batch, n, …]`, n positions at a time. Weights go by their canonical name, so a
    backend decides how each is stored. Keys, values, positions and masks are the backend's alone:
    the description says what is remembered and who reads it, never how.
    """

    def embedding(self, weight: str, scale: float) -> V:
        """`[batch, n, in]`: the rows of `weight` `[vocabulary, in]` at the input ids, times `scale`.

        Of a table that has fewer rows than there are ids, the first row stands for those that it has not.
        """

    def linear(self, x: V, weight: str) -> V:
        """`[…, out]`: `x` `[…, in]` times the transpose of `weight` `[out, in]`."""

    def rms_norm(self, x: V, weight: str | None, eps: float, offset: float) -> V:
        """x / sqrt(mean(x²) + eps) over the last axis, times (offset + weight); by 1 without a weight."""

    def split(self, x: V, parts: int) -> V:
        """`[…, parts, size]` out of `[…, parts * size]`."""

    def merge(self, x: V) -> V:
        """`[…, parts * size]` out of `[…, parts, size]`."""

    def part(self, x: V, index: int) -> V:
        """`[…, size]`: one part of `[…, parts, size]`."""

    def rotary(self, x: V, layer: Layer) -> V:
        """`x` `[batch, n, heads, head_dim]` rotated by its positions, pairing i with i + head_dim / 2."""

    def remember(self, k: V, v: V, layer: Layer) -> None:
        """Append keys and values `[batch, n, kv_heads, head_dim]` to the layer's cache."""

    def attention(self, q: V, layer: Layer, scale: float, softcap: float | None) -> V:
        """What `q` `[batch, n, heads, head_dim]` reads, same shape, out of the cache of `layer.kv_source`.

        Causal unless the decoder is `bidirectional`, and within its `reach` if the layer slides; heads share kv heads
        in equal groups.
        """

    def constant(self, weight: str) -> V:
        """A small tensor as a value, to multiply by."""

    def gelu(self, x: V) -> V:
        """GELU in its tanh form."""

    def add(self, a: V, b: V) -> V:
        """a + b, of one shape."""

    def mul(self, a: V, b: V) -> V:
        """a * b, broadcast."""

    def scale(self, x: V, factor: float) -> V:
        """x times a number."""

    def softcap(self, x: V, cap: float) -> V:
        """cap * tanh(x / cap)."""

    def above(self, x: V, deviations: float) -> V:
        """By how much `x` is above the mean of its last axis plus so many standard deviations of it; 0 below."""

    def as_large(self, x: V, like: V) -> V:
        """`x` times a number for each row of its last axis: the mean square is that of `like`, where it is not < 1e-5.

        A row whose mean square is smaller counts as one of 1e-5.
        """

    def softmax(self, x: V) -> V:
        """Softmax over the last axis, same shape."""

    def best(self, x: V, k: int) -> tuple[V, V]:
        """The `k` largest of `x` `[batch, n, size]` and their indices, each `[batch, n, k]`, in the same order."""

    def take(self, weight: str, ids: V) -> V:
        """The elements of a small tensor `weight` `[size]` at `ids`, of the shape of `ids`."""

    def experts(self, x: V, ids: V, shares: V, gate_up: str, down: str) -> V:
        """`[batch, n, hidden]`: what the experts `ids` make of `x` `[batch, n, hidden]`, each times its share.

        `ids` and `shares` are `[batch, n, k]`. An expert is a gated MLP as in `mlp`: its two projections from `hidden`
        are one above the other in `gate_up` `[experts, 2 * inner, hidden]`, `down` is `[experts, hidden, inner]`.
        """


class TextBackend(Backend[V], Protocol[V]):
    """The operations besides that make one vector of a text."""

    def mean(self, x: V) -> V:
        """`[batch, size]`: the mean of `x` `[batch, n, size]` over the positions that hold a token."""

    def unit(self, x: V) -> V:
        """`x` `[batch, size]` over its length."""


def logits(a: Architecture, b: Backend[V]) -> V:
    """The whole decoder: `[batch, n, vocabulary]` for the input ids."""
    x, tokens = embed(a, b)
    return head(a, b, layers(a, b, x, tokens))


def vectors(a: Architecture, e: Embedder, b: TextBackend[V]) -> tuple[V, V]:
    """A model that makes one vector of a text: its last hidden states `[batch, n, hidden]`, and `[batch, size]`."""
    x, tokens = embed(a, b)
    hidden = norm(a, b, layers(a, b, x, tokens), name(Role.FINAL_NORM))
    x = b.mean(hidden)
    for spec in e.specs():
        x = b.linear(x, spec.name)
    return hidden, b.unit(x)


def embed(a: Architecture, b: Backend[V]) -> tuple[V, V | None]:
    """What is looked up by id: `[batch, n, hidden]` and, of per-layer inputs, `[batch, n, layers * dim]`."""
    x = b.embedding(name(Role.EMBEDDING), a.embed_scale)
    if a.per_layer is None:
        return x, None
    return x, b.embedding(name(Role.PER_LAYER_EMBEDDING), a.per_layer.embed_scale)


def layers(a: Architecture, b: Backend[V], x: V, tokens: V | None) -> V:
    """`[batch, n, hidden]` after the last layer, before the last norm; `x`, `tokens` are from `embed`."""
    inputs = None if tokens is None else per_layer_inputs(a, b, x, tokens)
    if a.streams is not None:
        assert inputs is not None
        streams = spread(a, b, x)
        for layer in a.layers:
            streams = streams_layer(a, b, streams, b.part(inputs, layer.index), layer)
        return gathered(b, streams)
    for layer in a.layers:
        x = decoder_layer(a, b, x, None if inputs is None else b.part(inputs, layer.index), layer)
    return x


def head(a: Architecture, b: Backend[V], x: V) -> V:
    """Logits `[batch, n, vocabulary]` out of `[batch, n, hidden]`."""
    x = norm(a, b, x, name(Role.FINAL_NORM))
    x = b.linear(x, name(Role.EMBEDDING if a.tied else Role.HEAD))
    return x if a.final_softcap is None else b.softcap(x, a.final_softcap)


def per_layer_inputs(a: Architecture, b: Backend[V], x: V, tokens: V) -> V:
    """`[batch, n, layers, dim]`: what each layer is told of the token, by its id and by its embedding."""
    assert a.per_layer is not None
    context = b.scale(b.linear(x, name(Role.PER_LAYER_MODEL_PROJECTION)), a.per_layer.projection_scale)
    context = norm(a, b, b.split(context, len(a.layers)), name(Role.PER_LAYER_MODEL_NORM))
    return b.scale(b.add(context, b.split(tokens, len(a.layers))), a.per_layer.input_scale)


def decoder_layer(a: Architecture, b: Backend[V], x: V, told: V | None, layer: Layer) -> V:
    """One layer: attention, MLP and what the layer is told of the token, each added to the residual."""
    i = layer.index
    h = attention(a, b, norm(a, b, x, name(Role.INPUT_NORM, i)), layer)
    x = b.add(x, norm(a, b, h, name(Role.POST_ATTENTION_NORM, i)) if a.post_norms else h)
    h = mlp(b, norm(a, b, x, name(a.mlp_norm, i)), layer)
    if a.experts is not None:
        h = norm(a, b, h, name(Role.POST_DENSE_NORM, i))
        h = b.add(h, norm(a, b, experts(a, b, x, i), name(Role.POST_EXPERTS_NORM, i)))
    x = b.add(x, norm(a, b, h, name(Role.POST_MLP_NORM, i)) if a.post_norms else h)
    if told is not None:
        x = b.add(x, added(a, b, x, told, i))
    return b.mul(x, b.constant(name(Role.LAYER_SCALAR, i))) if a.layer_scalar else x


def added(a: Architecture, b: Backend[V], x: V, told: V, layer: int) -> V:
    """What a layer makes of what it is told of the token, seeing `x`."""
    h = b.mul(b.gelu(b.linear(x, name(Role.PER_LAYER_GATE, layer))), told)
    return norm(a, b, b.linear(h, name(Role.PER_LAYER_PROJECTION, layer)), name(Role.POST_PER_LAYER_NORM, layer))


def spread(a: Architecture, b: Backend[V], x: V) -> list[V]:
    """The streams that the first layer is given, each `[batch, n, hidden]`: the embedding, and others as large."""
    assert a.streams is not None
    return [x, *(b.as_large(b.linear(x, name(role)), x) for role in SPREADS[: a.streams.count - 1])]


def gathered(b: Backend[V], streams: list[V]) -> V:
    """One stream out of all: their mean, each as large as the first."""
    total, *others = streams
    for role, stream in zip(GATHERINGS, others, strict=False):
        total = b.add(total, b.as_large(b.linear(stream, name(role)), streams[0]))
    return b.scale(total, 1 / len(streams))


def streams_layer(a: Architecture, b: Backend[V], streams: list[V], told: V, layer: Layer) -> list[V]:
    """One layer of a decoder with several streams: all are predicted, one is computed, and all are corrected by it."""
    assert a.streams is not None
    i, active = layer.index, a.streams.active
    predicted = predictions(a, b, streams, i)
    x = predicted[active]
    h = norm(a, b, x, name(Role.INPUT_NORM, i))
    low = b.linear(b.linear(h, name(Role.RESIDUAL_LEFT, i)), name(Role.RESIDUAL_RIGHT, i))
    residual = b.add(h, norm(a, b, low, name(Role.RESIDUAL_NORM, i)))
    attended = b.add(x, norm(a, b, attention(a, b, h, layer), name(Role.POST_ATTENTION_NORM, i)))
    y = b.scale(b.add(attended, residual), 2.0**-0.5)
    h = mlp(b, norm(a, b, y, name(a.mlp_norm, i)), layer)
    y = b.add(y, norm(a, b, h, name(Role.POST_MLP_NORM, i)))
    corrected = corrections(a, b, predicted, y, i)
    h = added(a, b, b.mul(corrected[active], b.constant(name(Role.STREAM_SCALE, i))), told, i)
    return [corrected[0], *(b.add(stream, h) for stream in corrected[1:])]


def predictions(a: Architecture, b: Backend[V], streams: list[V], layer: int) -> list[V]:
    """What each stream will be: itself, and a sum of all with factors that the active one says."""
    assert a.streams is not None
    count = len(streams)
    said = b.linear(says(a, b, streams[a.streams.active], layer), name(Role.STREAMS_PREDICTION, layer))
    factors = b.split(said, count * count)
    found = []
    for row, stream in enumerate(streams):
        for column, other in enumerate(streams):
            stream = b.add(stream, b.mul(other, b.part(factors, row * count + column)))
        found.append(stream)
    return found


def corrections(a: Architecture, b: Backend[V], predicted: list[V], computed: V, layer: int) -> list[V]:
    """The predictions moved by what was wrong of the active one: as far as that, and factors of it."""
    assert a.streams is not None
    wrong = b.add(computed, b.scale(predicted[a.streams.active], -1.0))
    factors = b.split(b.linear(says(a, b, computed, layer), name(Role.STREAMS_CORRECTION, layer)), len(predicted))
    moves = (b.add(wrong, b.mul(wrong, b.part(factors, index))) for index in range(len(predicted)))
    return [b.add(stream, move) for stream, move in zip(predicted, moves, strict=True)]


def says(a: Architecture, b: Backend[V], x: V, layer: int) -> V:
    """`[batch, n, streams]`, each between -1 and 1: by what streams are mixed where the active one is `x`."""
    h = b.scale(norm(a, b, x, name(Role.STREAMS_NORM, layer)), 1 / a.hidden_size)
    return b.softcap(b.linear(h, name(Role.STREAMS_ROUTER, layer)), 1.0)


def attention(a: Architecture, b: Backend[V], x: V, layer: Layer) -> V:
    """Attention, of most families with normed queries and keys; a layer with another's keys and values only asks."""
    i = layer.index
    q = b.split(b.linear(x, name(Role.Q, i)), a.heads)
    q = norm(a, b, q, name(Role.Q_NORM, i)) if a.qk_norm else q
    if layer.owns_cache:
        k = b.split(b.linear(x, name(Role.K, i)), layer.kv_heads)
        v = k if layer.k_eq_v else b.split(b.linear(x, name(Role.V, i)), layer.kv_heads)
        v = b.rms_norm(v, None, a.rms_norm_eps, 0.0) if a.value_norm else v
        k = norm(a, b, k, name(Role.K_NORM, i)) if a.qk_norm else k
        b.remember(b.rotary(k, layer), v, layer)
    h = b.attention(b.rotary(q, layer), layer, a.attention_scale, a.attention_softcap)
    return b.linear(b.merge(h), name(Role.O, i))


def mlp(b: Backend[V], x: V, layer: Layer) -> V:
    """The gated MLP: down(gelu(gate(x)) * up(x)); of a sparse one, most of what the gate gives is 0."""
    i, gate = layer.index, b.linear(x, name(Role.GATE, layer.index))
    gate = b.gelu(gate if layer.deviations is None else b.above(gate, layer.deviations))
    return b.linear(b.mul(gate, b.linear(x, name(Role.UP, i))), name(Role.DOWN, i))


def experts(a: Architecture, b: Backend[V], x: V, layer: int) -> V:
    """What the experts that the router chooses make of `x`, which is what the layer's MLP reads, before its norm.

    The shares are those of a softmax over all experts, of which the best are kept and brought to a sum of 1: that is
    the softmax over the best. Then each is multiplied by a number of its expert's own.
    """
    assert a.experts is not None
    h = b.rms_norm(x, name(Role.ROUTER_SCALE, layer), a.rms_norm_eps, 0.0)
    scores = b.scale(b.linear(h, name(Role.ROUTER, layer)), a.hidden_size**-0.5)
    best, ids = b.best(scores, a.experts.top_k)
    shares = b.mul(b.softmax(best), b.take(name(Role.EXPERT_SCALE, layer), ids))
    x = norm(a, b, x, name(Role.PRE_EXPERTS_NORM, layer))
    return b.experts(x, ids, shares, name(Role.EXPERT_GATE_UP, layer), name(Role.EXPERT_DOWN, layer))


def norm(a: Architecture, b: Backend[V], x: V, weight: str) -> V:
    """RMSNorm with the weight called so."""
    return b.rms_norm(x, weight, a.rms_norm_eps, a.norm_offset)
