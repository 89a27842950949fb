"""What Gemma 2 and 3 share: layers that differ in their attention type alone, and an attention scale in the config."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, TypeVar

from gemexport.formats.gemma.architecture import Layer, Rope
from gemexport.formats.gemma.families.family import Family
from gemexport.formats.gemma.fields import SLIDING, Positive, TextFields


class EvenFields(TextFields):
    """Fields that both have, in the spelling of their releases and in that of transformers 5."""

    query_pre_attn_scalar: Positive = 256.0
    attn_logit_softcapping: Positive | None = None
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None


E = TypeVar("E", bound=EvenFields)


class Even(Family[E]):
    """Heads of one size, keys and values in every layer; norms add 1 to their weights."""

    norm_offset = 1.0
    value_norm = False
    partial_rope = False
    sentencepiece = True
    layer_scalar = False
    gguf_layers_by_width: ClassVar[int]  # of the model whose attention scale llama.cpp takes from its width

    @abstractmethod
    def rope(self, fields: E, kind: str) -> Rope:
        """The RoPE of the layers of an attention type; ValidationError for what is absurd."""

    def layers(self, fields: E) -> tuple[Layer, ...]:
        return tuple(
            Layer(
                index=index,
                sliding=kind == SLIDING,
                head_dim=fields.head_dim,
                kv_heads=fields.num_key_value_heads,
                intermediate_size=fields.intermediate_size,
                rope=self.rope(fields, kind),
                kv_source=index,
            )
            for index, kind in enumerate(fields.types())
        )

    def attention_scale(self, fields: E) -> float:
        scale: float = fields.query_pre_attn_scalar**-0.5
        return scale

    def attention_softcap(self, fields: E) -> float | None:
        return fields.attn_logit_softcapping

    def gguf_attention_scale(self, layers: int, head_dim: int, hidden: int, heads: int) -> float:
        # src/models/gemma2.cpp and gemma3.cpp
        return 1.0 / math.sqrt(max(1, hidden // heads) if layers == self.gguf_layers_by_width else head_dim)
