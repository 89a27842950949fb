"""What a Gemma decoder computes, and the tensors that it needs for that.

Which family of models it is, and how its config.json spelt this, is forgotten here: see `model.describe`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from gemexport.formats.gemma.names import CANONICAL
from gemexport.formats.gemma.roles import Role

Shape = tuple[int, ...]
SPREADS = (Role.FIRST_SPREAD, Role.SECOND_SPREAD, Role.THIRD_SPREAD)
GATHERINGS = (Role.FIRST_GATHERING, Role.SECOND_GATHERING, Role.THIRD_GATHERING)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a model needs: its canonical name, its shape and what it is for."""

    name: str
    shape: Shape
    role: Role
    layer: int | None  # None of what there is once


class Rope(BaseModel):
    """Rotary position embedding of one layer (https://arxiv.org/abs/2104.09864), in the half-split layout."""

    model_config = ConfigDict(frozen=True)

    theta: float
    rotary_dims: int  # dimensions of a head that rotate; the rest pass through (proportional RoPE)
    factor: float = 1.0  # frequencies are divided by it (linear scaling)

    def inv_freq(self, head_dim: int) -> NDArray[np.float64]:
        """Radians a position for each pair of dimensions, `[head_dim // 2]`; zero where nothing rotates.

        The exponent's denominator is the whole head, also where only a part rotates: that is what makes it
        "proportional" (transformers' modeling_rope_utils).
        """
        frequencies = np.zeros(head_dim // 2)
        pairs = np.arange(0, self.rotary_dims, 2)
        frequencies[: len(pairs)] = 1.0 / self.theta ** (pairs / head_dim) / self.factor
        return frequencies


class Layer(BaseModel):
    """One decoder layer."""

    model_config = ConfigDict(frozen=True)

    index: int
    sliding: bool
    head_dim: int
    kv_heads: int
    intermediate_size: int
    rope: Rope
    kv_source: int  # its own index, or the layer whose keys and values it reads
    k_eq_v: bool = False  # no v_proj: the values are the unnormalised key projection
    sparsity: float = 0.0  # the share of the gate's outputs that becomes 0, were they normal; see `deviations`

    @property
    def owns_cache(self) -> bool:
        """Whether this layer computes keys and values (else it reads a donor's)."""
        return self.kv_source == self.index

    @property
    def deviations(self) -> float | None:
        """So many standard deviations above its mean a gate's output must be to count; None where all do."""
        return NormalDist().inv_cdf(self.sparsity) if self.sparsity else None


class PerLayerEmbeddings(BaseModel):
    """Gemma 4's per-layer embeddings: one table of `[vocab_size, layers * dim]`."""

    model_config = ConfigDict(frozen=True)

    dim: int
    vocab_size: int
    embed_scale: float
    projection_scale: float
    input_scale: float = 2.0**-0.5


class Experts(BaseModel):
    """A mixture of experts beside each layer's dense MLP (Gemma4TextExperts and Gemma4TextRouter of transformers)."""

    model_config = ConfigDict(frozen=True)

    count: int
    top_k: int  # experts a token goes through
    intermediate_size: int  # of each


class Streams(BaseModel):
    """Hidden states beside each other, of which a layer computes one and predicts the rest; and its other residual.

    AltUp (https://arxiv.org/abs/2301.13310) and LAuReL (https://arxiv.org/abs/2411.07501), as Gemma3nTextAltUp and
    Gemma3nTextLaurelBlock of transformers have them.
    """

    model_config = ConfigDict(frozen=True)

    count: int
    active: int  # the stream that is computed
    rank: int  # of the residual beside attention


class Architecture(BaseModel):
    """A Gemma text decoder."""

    model_config = ConfigDict(frozen=True)

    vocab_size: int
    hidden_size: int
    heads: int
    layers: tuple[Layer, ...]
    rms_norm_eps: float
    norm_offset: float  # a norm multiplies by offset + weight: 1 for Gemma 3, 0 for Gemma 4
    attention_scale: float
    sliding_window: int  # see `reach`
    final_softcap: float | None
    attention_softcap: float | None
    embed_scale: float
    tied: bool
    per_layer: PerLayerEmbeddings | None
    value_norm: bool  # values are RMS-normed, without a weight
    experts: Experts | None  # in every layer
    streams: Streams | None = None
    layer_scalar: bool  # each layer's output is multiplied by a scalar
    qk_norm: bool = True  # queries and keys are RMS-normed
    post_norms: bool = True  # what attention and MLP add to the residual is RMS-normed
    mlp_norm: Role = Role.PRE_MLP_NORM  # the norm that the MLP reads through
    bidirectional: bool = False  # a query sees what comes after it as well
    max_positions: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @property
    def reach(self) -> int:
        """How many positions before its own a query of a sliding layer sees; as many after it, of both ways."""
        return self.sliding_window // 2 if self.bidirectional else self.sliding_window - 1

    def specs(self) -> Iterator[TensorSpec]:
        """Every tensor that the decoder needs, in the order of use."""
        hidden = self.hidden_size
        top: dict[Role, Shape] = {Role.EMBEDDING: (self.vocab_size, hidden)}
        if self.per_layer:
            width = len(self.layers) * self.per_layer.dim
            top[Role.PER_LAYER_EMBEDDING] = (self.per_layer.vocab_size, width)
            top[Role.PER_LAYER_MODEL_PROJECTION] = (width, hidden)
            top[Role.PER_LAYER_MODEL_NORM] = (self.per_layer.dim,)
        others = self.streams.count - 1 if self.streams else 0
        top |= dict.fromkeys(SPREADS[:others], (hidden, hidden))
        yield from _specs(top, None)
        for layer in self.layers:
            yield from _specs(self._mixing() | self._attention(layer) | self._mlp(layer) | self._told(), layer.index)
        end: dict[Role, Shape] = {**dict.fromkeys(GATHERINGS[:others], (hidden, hidden)), Role.FINAL_NORM: (hidden,)}
        yield from _specs(end if self.tied else end | {Role.HEAD: (self.vocab_size, hidden)}, None)

    def _mixing(self) -> dict[Role, Shape]:
        """What predicts and corrects streams, and the residual of low rank."""
        if self.streams is None:
            return {}
        hidden, count, rank = self.hidden_size, self.streams.count, self.streams.rank
        return {
            Role.STREAMS_NORM: (hidden,),
            Role.STREAMS_ROUTER: (count, hidden),
            Role.STREAMS_PREDICTION: (count * count, count),
            Role.STREAMS_CORRECTION: (count, count),
            Role.STREAM_SCALE: (hidden,),
            Role.RESIDUAL_LEFT: (rank, hidden),
            Role.RESIDUAL_RIGHT: (hidden, rank),
            Role.RESIDUAL_NORM: (hidden,),
        }

    def _attention(self, layer: Layer) -> dict[Role, Shape]:
        hidden, query, keys = self.hidden_size, self.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        shapes: dict[Role, Shape] = {
            Role.INPUT_NORM: (hidden,),
            Role.Q: (query, hidden),
        }
        if self.qk_norm:
            shapes[Role.Q_NORM] = (layer.head_dim,)
        if layer.owns_cache:
            shapes[Role.K] = (keys, hidden)
            if self.qk_norm:
                shapes[Role.K_NORM] = (layer.head_dim,)
            if not layer.k_eq_v:
                shapes[Role.V] = (keys, hidden)
        shapes[Role.O] = (hidden, query)
        return shapes | {Role.POST_ATTENTION_NORM: (hidden,)} if self.post_norms else shapes

    def _mlp(self, layer: Layer) -> dict[Role, Shape]:
        hidden, wide, experts = self.hidden_size, layer.intermediate_size, self.experts
        shapes: dict[Role, Shape] = {
            self.mlp_norm: (hidden,),
            Role.GATE: (wide, hidden),
            Role.UP: (wide, hidden),
            Role.DOWN: (hidden, wide),
        }
        if experts:
            shapes |= {
                Role.POST_DENSE_NORM: (hidden,),
                Role.ROUTER_SCALE: (hidden,),
                Role.ROUTER: (experts.count, hidden),
                Role.EXPERT_SCALE: (experts.count,),
                Role.PRE_EXPERTS_NORM: (hidden,),
                Role.EXPERT_GATE_UP: (experts.count, 2 * experts.intermediate_size, hidden),
                Role.EXPERT_DOWN: (experts.count, hidden, experts.intermediate_size),
                Role.POST_EXPERTS_NORM: (hidden,),
            }
        return shapes | {Role.POST_MLP_NORM: (hidden,)} if self.post_norms else shapes

    def _told(self) -> dict[Role, Shape]:
        """What a layer does with its per-layer input, and its scalar."""
        shapes: dict[Role, Shape] = {}
        if self.per_layer:
            shapes = {
                Role.PER_LAYER_GATE: (self.per_layer.dim, self.hidden_size),
                Role.PER_LAYER_PROJECTION: (self.hidden_size, self.per_layer.dim),
                Role.POST_PER_LAYER_NORM: (self.hidden_size,),
            }
        return shapes | ({Role.LAYER_SCALAR: (1,)} if self.layer_scalar else {})

    def tensor_shapes(self) -> dict[str, Shape]:
        """Canonical name and shape of every tensor that the decoder needs, in the order of use."""
        return {spec.name: spec.shape for spec in self.specs()}

    def parameters(self) -> int:
        """How many weights the decoder has."""
        return sum(math.prod(spec.shape) for spec in self.specs())


def _specs(shapes: dict[Role, Shape], layer: int | None) -> Iterator[TensorSpec]:
    for role, shape in shapes.items():
        yield TensorSpec(CANONICAL.name(role, layer), shape, role, layer)
