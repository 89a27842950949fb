"""What a tensor of a Gemma is for.

A role and, of tensors that every layer has, the layer's number say which tensor it is; what its name or its shape looks
like does not. A tower of a multimodal model would add its roles here (a convolution, a table of positions, the bounds
of a clipped linear), each of a kind.
"""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """What is done with a tensor."""

    EMBEDDING = "embedding"  # `[vocabulary, width]`: rows are looked up by token id
    HEAD = "head"  # `[vocabulary, width]`: a linear whose outputs are logits
    LINEAR = "linear"  # `[out, in]`
    ROUTER = "router"  # `[experts, in]`: a linear whose outputs choose experts
    MIXER = "mixer"  # `[few, in]`: a small linear whose outputs mix streams; no recipe quantizes it
    EXPERT = "expert"  # `[experts, out, in]`: a linear of each expert
    NORM = "norm"  # `[width]`: what an RMSNorm multiplies by, less the family's offset
    SCALE = "scale"  # `[width]`: factors, as they are


class Role(Enum):
    """One tensor of a decoder, or one of each layer."""

    EMBEDDING = ("embedding", Kind.EMBEDDING, False)
    PER_LAYER_EMBEDDING = ("per-layer embedding", Kind.EMBEDDING, False)
    PER_LAYER_MODEL_PROJECTION = ("per-layer model projection", Kind.LINEAR, False)
    PER_LAYER_MODEL_NORM = ("per-layer model norm", Kind.NORM, False)
    FIRST_SPREAD = ("first spread", Kind.LINEAR, False)  # of the embedding to another stream (AltUp)
    SECOND_SPREAD = ("second spread", Kind.LINEAR, False)
    THIRD_SPREAD = ("third spread", Kind.LINEAR, False)
    STREAMS_NORM = ("streams norm", Kind.NORM, True)  # of the stream that the mixing of all is told by
    STREAMS_ROUTER = ("streams router", Kind.MIXER, True)
    STREAMS_PREDICTION = ("streams prediction", Kind.MIXER, True)
    STREAMS_CORRECTION = ("streams correction", Kind.MIXER, True)
    STREAM_SCALE = ("stream scale", Kind.SCALE, True)  # on what the per-layer gate is shown
    RESIDUAL_LEFT = ("residual left", Kind.LINEAR, True)  # of the residual of low rank beside attention (LAuReL)
    RESIDUAL_RIGHT = ("residual right", Kind.LINEAR, True)
    RESIDUAL_NORM = ("residual norm", Kind.NORM, True)
    INPUT_NORM = ("input norm", Kind.NORM, True)
    Q = ("q", Kind.LINEAR, True)
    Q_NORM = ("q norm", Kind.NORM, True)
    K = ("k", Kind.LINEAR, True)
    K_NORM = ("k norm", Kind.NORM, True)
    V = ("v", Kind.LINEAR, True)
    O = ("o", Kind.LINEAR, True)  # noqa: E741
    POST_ATTENTION_NORM = ("post-attention norm", Kind.NORM, True)
    PRE_MLP_NORM = ("pre-MLP norm", Kind.NORM, True)
    GATE = ("gate", Kind.LINEAR, True)
    UP = ("up", Kind.LINEAR, True)
    DOWN = ("down", Kind.LINEAR, True)
    POST_DENSE_NORM = ("post-dense norm", Kind.NORM, True)  # of the dense MLP alone, where there are experts beside it
    ROUTER_SCALE = ("router scale", Kind.SCALE, True)  # on what the router is shown
    ROUTER = ("router", Kind.ROUTER, True)
    EXPERT_SCALE = ("per-expert scale", Kind.SCALE, True)  # on what an expert's output is weighted by
    PRE_EXPERTS_NORM = ("pre-experts norm", Kind.NORM, True)
    EXPERT_GATE_UP = ("expert gate and up", Kind.EXPERT, True)  # `[experts, 2 * width, in]`: gate's rows, then up's
    EXPERT_DOWN = ("expert down", Kind.EXPERT, True)
    POST_EXPERTS_NORM = ("post-experts norm", Kind.NORM, True)
    POST_MLP_NORM = ("post-MLP norm", Kind.NORM, True)
    PER_LAYER_GATE = ("per-layer gate", Kind.LINEAR, True)
    PER_LAYER_PROJECTION = ("per-layer projection", Kind.LINEAR, True)
    POST_PER_LAYER_NORM = ("post-per-layer norm", Kind.NORM, True)
    LAYER_SCALAR = ("layer scalar", Kind.SCALE, True)
    FIRST_GATHERING = ("first gathering", Kind.LINEAR, False)  # of another stream, before all become one
    SECOND_GATHERING = ("second gathering", Kind.LINEAR, False)
    THIRD_GATHERING = ("third gathering", Kind.LINEAR, False)
    FINAL_NORM = ("final norm", Kind.NORM, False)
    HEAD = ("head", Kind.HEAD, False)
    FIRST_DENSE = ("first dense", Kind.LINEAR, False)  # of a text's vector, after the pooling
    SECOND_DENSE = ("second dense", Kind.LINEAR, False)

    def __init__(self, label: str, kind: Kind, in_layer: bool) -> None:
        self.label = label
        self.kind = kind
        self.in_layer = in_layer  # whether every layer may have one

    def __str__(self) -> str:
        return self.label

    @property
    def is_norm(self) -> bool:
        """Whether an RMSNorm multiplies by it."""
        return self.kind is Kind.NORM

    @property
    def has_rows(self) -> bool:
        """Whether it is made of rows that may lie on a grid, `[…, in]`; else it is a vector of factors."""
        return self.kind not in (Kind.NORM, Kind.SCALE)

    @property
    def is_matrix(self) -> bool:
        """Whether it is one matrix `[out, in]`."""
        return self.has_rows and self.kind is not Kind.EXPERT

    @property
    def block(self) -> str:
        """The part of a layer that it belongs to: attention, MLP or other."""
        if self in (Role.Q, Role.Q_NORM, Role.K, Role.K_NORM, Role.V, Role.O):
            return "attention"
        dense = self in (Role.GATE, Role.UP, Role.DOWN)
        return "MLP" if dense or self.kind in (Kind.ROUTER, Kind.EXPERT) else "other"

    @property
    def is_looked_up(self) -> bool:
        """Whether its rows are looked up by token id."""
        return self.kind is Kind.EMBEDDING
