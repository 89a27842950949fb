"""Gemma 2, as transformers' modeling_gemma2.py and configuration_gemma2.py have it.

Every other layer slides; queries and keys are not normed, attention scores and logits are soft-capped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemexport.formats.gemma.architecture import Rope
from gemexport.formats.gemma.facts import COMMON, Fact, Flat, Form, spelt
from gemexport.formats.gemma.families.even import Even, EvenFields
from gemexport.formats.gemma.families.family import Wording, rope
from gemexport.formats.gemma.fields import Positive, Size, kind_of

THETA = 10_000.0
PERIOD = 2
ATTENTION_CAP, FINAL_CAP = 50.0, 30.0
VOCABULARY = 256_000
WINDOW = 4096


def _usual(flat: Mapping[str, Any]) -> list[bool]:
    """Which layers slide where a file does not say it."""
    return [bool((index + 1) % PERIOD) for index in range(flat["layers"])]


# src/models/gemma2.cpp
FACTS: tuple[Fact, ...] = (
    *COMMON,
    Fact("full.rope.theta", Form.POSITIVE, "{arch}.rope.freq_base", THETA),
    Fact(
        "sliding.rope.theta",
        Form.POSITIVE,
        "{arch}.rope.freq_base_swa",
        lambda flat: flat["full.rope.theta"],
        always=False,
    ),
    Fact("full.rope.scaling", Form.TEXT, "{arch}.rope.scaling.type", "linear"),
    Fact("full.rope.factor", Form.NUMBER, "{arch}.rope.scaling.factor", 1.0, always=False),
    Fact("sliding_window", Form.COUNT_OR_NONE, "{arch}.attention.sliding_window", WINDOW),
    Fact("sliding", Form.PERIOD, "{arch}.attention.sliding_window_pattern", _usual, always=False),
    Fact("attention_softcap", Form.CAP, "{arch}.attn_logit_softcapping", ATTENTION_CAP),
    Fact("final_softcap", Form.CAP, "{arch}.final_logit_softcapping", FINAL_CAP),
)


class Fields(EvenFields):
    """Gemma 2's own fields, with transformers' defaults."""

    attn_logit_softcapping: Positive | None = ATTENTION_CAP
    final_logit_softcapping: Positive | None = FINAL_CAP
    max_position_embeddings: Size = 8192
    sliding_window_pattern: Size | None = PERIOD


class Gemma2(Even[Fields]):
    """Norms before and after attention and MLP, none of queries and keys."""

    name = text_type = reference_type = gguf = mlx_type = "gemma2"
    reference_class = "Gemma2ForCausalLM"
    wording = Wording(("<start_of_turn>", "<end_of_turn>"), eos="<eos>", adds_runs=True)
    facts = FACTS
    fields = Fields
    default_vocabulary = VOCABULARY
    default_window = WINDOW
    gguf_layers_by_width = 46  # 27B
    qk_norm = False
    caps_attention = True
    mlx_rounds_embed_scale = False

    def refused(self, fields: Fields) -> dict[str, bool]:
        ropes = {kind for _, kind in fields.ropes()}
        return {**fields.refused(), "positions are scaled": bool(ropes - {"default"})}

    def rope(self, fields: Fields, kind: str) -> Rope:
        given = fields.rope_parameters or {}
        theta = given.get("rope_theta") or fields.rope_theta or THETA
        return rope({"rope_type": kind_of(given), "rope_theta": theta}, fields.head_dim)

    def own_config(self, flat: Flat) -> dict[str, Any]:
        return {
            **spelt(flat, "attention_softcap", "final_softcap"),
            "head_dim": flat["full.head_dim"],
            "num_key_value_heads": flat["kv_heads"][0],
            "rope_theta": flat["full.rope.theta"],
        }

    def file_config(self, flat: Flat, q_norm_factor: float) -> dict[str, Any]:
        sizes = (flat[name] for name in ("layers", "full.head_dim", "hidden_size", "heads"))
        scalar = self.gguf_attention_scale(*sizes) ** -2
        return {"query_pre_attn_scalar": round(scalar), "use_bidirectional_attention": False}

    def mlx_config(self, flat: Flat, source: dict[str, Any]) -> dict[str, Any]:
        return {"query_pre_attn_scalar": source.get("query_pre_attn_scalar", 256)}

    def mlx_problem(self, flat: Flat) -> str | None:
        if None in (flat["final_softcap"], flat["attention_softcap"]):
            return "has no soft caps"
        if any(flat["sliding"]) and flat["sliding_window"] < flat["max_positions"]:
            return "has sliding attention"
        return None if flat["tied"] else "has a head of its own"

    def gguf_problem(self, flat: Flat) -> str | None:
        return "it has no soft caps" if None in (flat["final_softcap"], flat["attention_softcap"]) else None
