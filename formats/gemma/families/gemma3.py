"""Gemma 3, as transformers' modeling_gemma3.py and configuration_gemma3.py have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from gemexport.formats.gemma.architecture import Rope
from gemexport.formats.gemma.facts import COMMON, SLIDING_THETA, Fact, Flat, Form
from gemexport.formats.gemma.families.even import Even, EvenFields
from gemexport.formats.gemma.families.family import Wording, rope
from gemexport.formats.gemma.fields import SLIDING, Positive

THETAS = {True: 10_000.0, False: 1_000_000.0}  # of sliding layers and of full ones, where a config names none


PATTERN = 6  # llama.cpp's default: every sixth layer sees everything
# Ollama's converter has names of its own for the bases of sliding and full layers (convert_gemma3.go).
OLLAMA_LOCAL, OLLAMA_GLOBAL = "{arch}.rope.local.freq_base", "{arch}.rope.global.freq_base"


def _usual(flat: Mapping[str, Any]) -> list[bool]:
    """Which layers slide where a file does not say it."""
    return [bool(flat["sliding_window"]) and bool((index + 1) % PATTERN) for index in range(flat["layers"])]


# src/models/gemma3.cpp
FACTS: tuple[Fact, ...] = (
    *COMMON,
    Fact("full.rope.theta", Form.POSITIVE, "{arch}.rope.freq_base", SLIDING_THETA, others=(OLLAMA_GLOBAL,)),
    Fact("sliding.rope.theta", Form.POSITIVE, "{arch}.rope.freq_base_swa", SLIDING_THETA, others=(OLLAMA_LOCAL,)),
    Fact("sliding_window", Form.COUNT_OR_NONE, "{arch}.attention.sliding_window", 0, always=False),
    Fact(
        "sliding",
        Form.PERIOD,
        "{arch}.attention.sliding_window_pattern",
        _usual,
        always=False,
        needs="sliding_window",
    ),
    Fact("full.rope.scaling", Form.TEXT, "{arch}.rope.scaling.type", "linear"),
    Fact(
        "full.rope.factor",
        Form.NUMBER,
        "{arch}.rope.scaling.factor",
        1.0,
        always=False,
        others=("{arch}.rope.scale_linear",),
    ),
    Fact("final_softcap", Form.CAP, "{arch}.final_logit_softcapping", None, always=False),
    Fact("full.head_dim", Form.COUNT, "{arch}.rope.dimension_count", lambda flat: flat["full.head_dim"], always=False),
)


def pattern(flat: Mapping[str, Any]) -> int | None:
    """Every how many layers one is a full one, the last of each run; None when there is no such number."""
    slides = flat["sliding"]
    every: int = slides.index(False) + 1 if False in slides else 0
    same = every and all(slide == bool((index + 1) % every) for index, slide in enumerate(slides))
    return every if same else None


class Fields(EvenFields):
    """Gemma 3's own fields, in the spelling of its release and in that of transformers 5."""

    rope_local_base_freq: Positive | None = None


class Gemma3(Even[Fields]):
    """Sliding layers and full ones each have a base of their own for their angles."""

    name = "gemma3"
    text_type = reference_type = mlx_type = "gemma3_text"
    gguf = "gemma3"
    whole_type: ClassVar[str | None] = "gemma3"
    whole_class: ClassVar[str | None] = "Gemma3ForConditionalGeneration"
    reference_class = "Gemma3ForCausalLM"
    wording = Wording(("<start_of_turn>", "<end_of_turn>"), eos="<end_of_turn>", adds_runs=True)
    facts = FACTS
    fields = Fields
    default_vocabulary = 262_208
    default_window = 4096
    gguf_layers_by_width = 62  # 27B
    mlx_rounds_embed_scale = True

    def rope(self, fields: Fields, kind: str) -> Rope:
        sliding = kind == SLIDING
        given = dict((fields.rope_parameters or {}).get(kind) or {})
        if not sliding and fields.rope_scaling:
            given |= fields.rope_scaling
        flat = fields.rope_local_base_freq if sliding else fields.rope_theta
        given.setdefault("rope_theta", flat or THETAS[sliding])
        return rope(given, fields.head_dim)

    def own_config(self, flat: Flat) -> dict[str, Any]:
        factor = flat["full.rope.factor"]
        thetas = {"rope_local_base_freq": flat["sliding.rope.theta"], "rope_theta": flat["full.rope.theta"]}
        return {
            "head_dim": flat["full.head_dim"],
            "num_key_value_heads": flat["kv_heads"][0],
            "rope_scaling": None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
            **{key: theta for key, theta in thetas.items() if theta is not None},
        }

    def file_config(self, flat: Flat, q_norm_factor: float) -> dict[str, Any]:
        return {
            "attn_logit_softcapping": None,
            "query_pre_attn_scalar": self._scalar(flat, q_norm_factor),
            "use_bidirectional_attention": False,
        }

    def _scalar(self, flat: Flat, factor: float) -> float:
        """The shortest number of which llama.cpp's attention scale times `factor` is the root's inverse."""
        sizes = (flat[name] for name in ("layers", "full.head_dim", "hidden_size", "heads"))
        built_in = self.gguf_attention_scale(*sizes)
        exact = (built_in * factor) ** -2
        for digits in range(1, 17):
            candidate = float(f"{exact:.{digits}g}")
            if np.float32(candidate**-0.5 / built_in) == np.float32(factor):
                return int(candidate) if candidate.is_integer() else candidate
        return exact

    def mlx_config(self, flat: Flat, source: dict[str, Any]) -> dict[str, Any]:
        scalar = source.get("query_pre_attn_scalar", 256)
        return {"query_pre_attn_scalar": scalar, "sliding_window_pattern": pattern(flat)}

    def mlx_problem(self, flat: Flat) -> str | None:
        if flat["final_softcap"] is not None:
            return "has a soft cap"
        if flat["sliding.rope.theta"] is not None and flat["sliding.rope.factor"] != 1.0:
            return "scales the positions of sliding layers"
        return None if pattern(flat) else "does not repeat one pattern of sliding and full attention"
