"""Gemma 1, as transformers' modeling_gemma.py has it: a Gemma 2 whose layers all see everything, without soft caps.

A layer has two norms, before attention and before the MLP; transformers calls the second by where it stands, after
attention, where later Gemmas have a norm of what attention adds.
"""

from __future__ import annotations

import math
from typing import Any

from gemexport.formats.gemma.facts import COMMON, Fact, Flat, Form
from gemexport.formats.gemma.families.gemma2 import THETA, Fields, Gemma2
from gemexport.formats.gemma.fields import FULL, Positive
from gemexport.formats.gemma.roles import Role

TANH = "gelu_pytorch_tanh"
# The releases say "gelu" and mean its tanh form (configuration_gemma.py).
ACTIVATIONS = ("gelu", TANH)
POSITIONS = 8192


# src/models/gemma.cpp
FACTS: tuple[Fact, ...] = (
    *COMMON,
    Fact("full.rope.theta", Form.POSITIVE, "{arch}.rope.freq_base", THETA),
    Fact("full.rope.scaling", Form.TEXT, "{arch}.rope.scaling.type", "linear"),
    Fact("full.rope.factor", Form.NUMBER, "{arch}.rope.scaling.factor", 1.0, always=False),
)


class Gemma1Fields(Fields):
    """Gemma 1's own fields, with transformers' defaults."""

    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    hidden_act: str = TANH

    def types(self) -> list[str]:
        return [FULL] * self.num_hidden_layers


class Gemma1(Gemma2):
    """Attention is scaled by the size of a head, in every program."""

    name = text_type = reference_type = gguf = "gemma"
    mlx_type = "gemma"
    reference_class = "GemmaForCausalLM"
    facts = FACTS
    fields = Gemma1Fields
    default_window = POSITIONS  # of no layer
    post_norms = False
    mlp_norm = Role.POST_ATTENTION_NORM
    caps_attention = False

    def spelt(self, config: dict[str, Any]) -> dict[str, Any]:
        # Some releases have the later key as null beside `hidden_act`, which is what transformers reads.
        return {key: value for key, value in config.items() if key != "hidden_activation" or value is not None}

    def refused(self, fields: Fields) -> dict[str, bool]:
        activation = getattr(fields, "hidden_act", TANH)
        return {**super().refused(fields), f"the activation is {activation}": activation not in ACTIVATIONS}

    def attention_scale(self, fields: Fields) -> float:
        return 1.0 / math.sqrt(fields.head_dim)

    def own_config(self, flat: Flat) -> dict[str, Any]:
        own = super().own_config({**flat, "attention_softcap": None, "final_softcap": None})
        return {key: value for key, value in own.items() if value is not None}

    def file_config(self, flat: Flat, q_norm_factor: float) -> dict[str, Any]:
        return {"hidden_act": TANH, "use_bidirectional_attention": False}

    def built_in(self, layers: int) -> Flat:
        return {"sliding": [False] * layers, "sliding_window": 0, "attention_softcap": None, "final_softcap": None}

    def mlx_problem(self, flat: Flat) -> str | None:
        return "has Gemma 1's GELU in its tanh form"  # mlx_lm.models.gemma has erf's

    def gguf_problem(self, flat: Flat) -> str | None:
        return None if flat["tied"] else "there is no head of its own in the graph of a Gemma 1"

    def gguf_attention_scale(self, layers: int, head_dim: int, hidden: int, heads: int) -> float:
        return 1.0 / math.sqrt(head_dim)
