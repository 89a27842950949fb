"""Gemma 3, as transformers' modeling_gemma3.py and configuration_gemma3.py have it."""

from __future__ import annotations

import math
from typing import Any

from gemexport.formats.gemma.architecture import Layer, Rope
from gemexport.formats.gemma.families.family import Family, Wording, rope
from gemexport.formats.gemma.fields import SLIDING, Positive, TextFields

THETAS = {True: 10_000.0, False: 1_000_000.0}  # of sliding layers and of full ones, where a config names none


class Fields(TextFields):
    """Gemma 3's own fields, in the spelling of its release and in that of transformers 5."""

    attn_logit_softcapping: Positive | None = None
    query_pre_attn_scalar: Positive = 256.0
    rope_theta: Positive | None = None
    rope_local_base_freq: Positive | None = None
    rope_scaling: dict[str, Any] | None = None


class Gemma3(Family[Fields]):
    """Heads of one size; norms add 1 to their weights; the attention scale is a field."""

    name = "gemma3"
    text_type = reference_type = mlx_type = "gemma3_text"
    whole_type = gguf = "gemma3"
    whole_class = "Gemma3ForConditionalGeneration"
    reference_class = "Gemma3ForCausalLM"
    wording = Wording(("<start_of_turn>", "<end_of_turn>"), eos="<end_of_turn>", adds_runs=True)
    fields = Fields
    default_vocabulary = 262_208
    default_window = 4096
    norm_offset = 1.0
    value_norm = False
    partial_rope = False
    sentencepiece = True
    mlx_rounds_embed_scale = True
    layer_scalar = False

    def layers(self, fields: Fields) -> tuple[Layer, ...]:
        return tuple(
            Layer(
                index=index,
                sliding=kind == SLIDING,
                head_dim=fields.head_dim,
                kv_heads=fields.num_key_value_heads,
                intermediate_size=fields.intermediate_size,
                rope=self._rope(fields, kind),
                kv_source=index,
            )
            for index, kind in enumerate(fields.types())
        )

    def _rope(self, fields: Fields, kind: str) -> Rope:
        sliding = kind == SLIDING
        given = dict((fields.rope_parameters or {}).get(kind) or {})
        if not sliding and fields.rope_scaling:
            given |= fields.rope_scaling
        flat = fields.rope_local_base_freq if sliding else fields.rope_theta
        given.setdefault("rope_theta", flat or THETAS[sliding])
        return rope(given, fields.head_dim)

    def attention_scale(self, fields: Fields) -> float:
        scale: float = fields.query_pre_attn_scalar**-0.5
        return scale

    def gguf_attention_scale(self, layers: int, head_dim: int, hidden: int, heads: int) -> float:
        # src/models/gemma3.cpp: of the 62 layers of the 27B one it follows from its width.
        return 1.0 / math.sqrt(max(1, hidden // heads) if layers == 62 else head_dim)

    def attention_softcap(self, fields: Fields) -> float | None:
        return fields.attn_logit_softcapping
