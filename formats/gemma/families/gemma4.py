"""Gemma 4, as transformers' modeling_gemma4.py and configuration_gemma4.py have it.

transformers 5.23 keeps what differs between layers in `per_layer_config`; older configs say `global_head_dim` and
`num_global_key_value_heads`. Both become the same layers here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, Field

from gemexport.formats.gemma.architecture import Experts, Layer, PerLayerEmbeddings, Rope
from gemexport.formats.gemma.facts import COMMON, SLIDING_THETA, Fact, Flat, Form, head_size, spelt
from gemexport.formats.gemma.families.family import Family, Wording, rope, spelt_rope
from gemexport.formats.gemma.fields import FULL, SLIDING, Least, Size, TextFields

ROPES: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
GLOBAL_HEAD_DIM = 512
MARKUP = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')


SOFTCAP = 30.0  # llama.cpp's default; 0 stands for none


def _head_dim(kind: str) -> Callable[[Mapping[str, Any]], int]:
    return lambda flat: int(flat[f"{kind}.head_dim"])


# src/models/gemma4.cpp
FACTS = (
    *COMMON,
    Fact("full.rope.theta", Form.POSITIVE, "{arch}.rope.freq_base", 1_000_000.0),
    Fact("sliding.rope.theta", Form.POSITIVE, "{arch}.rope.freq_base_swa", SLIDING_THETA),
    Fact("experts.count", Form.COUNT_OR_NONE, "{arch}.expert_count", 0, always=False),
    Fact("experts.top_k", Form.COUNT, "{arch}.expert_used_count", needs="experts.count"),
    Fact("experts.intermediate_size", Form.COUNT, "{arch}.expert_feed_forward_length", needs="experts.count"),
    Fact("sliding_window", Form.COUNT_OR_NONE, "{arch}.attention.sliding_window", 0),
    Fact("sliding", Form.FLAGS, "{arch}.attention.sliding_window_pattern"),
    Fact("shared", Form.COUNT_OR_NONE, "{arch}.attention.shared_kv_layers", 0),
    Fact("sliding.head_dim", Form.COUNT, "{arch}.attention.key_length_swa", head_size),
    Fact("sliding.head_dim", Form.COUNT, "{arch}.attention.value_length_swa", _head_dim("sliding")),
    Fact("full.head_dim", Form.COUNT, "{arch}.rope.dimension_count", _head_dim("full")),
    Fact("sliding.head_dim", Form.COUNT, "{arch}.rope.dimension_count_swa", _head_dim("sliding")),
    Fact("per_layer.dim", Form.COUNT_OR_NONE, "{arch}.embedding_length_per_layer_input", 0),
    Fact("final_softcap", Form.CAP, "{arch}.final_logit_softcapping", SOFTCAP),
)


def key_value_heads(flat: Mapping[str, Any]) -> tuple[int, int]:
    """Key/value heads of sliding layers and of full ones; of a type that there is not, the other's."""
    found = dict(zip(flat["sliding"], flat["kv_heads"], strict=True))
    some = flat["kv_heads"][0]
    return found.get(True, some), found.get(False, some)


class OwnFields(BaseModel):
    """What a layer has otherwise than the rest."""

    head_dim: Size | None = None
    num_key_value_heads: Size | None = None


class Fields(TextFields):
    """Gemma 4's own fields, in both spellings."""

    global_head_dim: Size | None = None
    num_global_key_value_heads: Size | None = None
    per_layer_config: dict[int, OwnFields] | None = None
    attention_k_eq_v: bool = False
    num_kv_shared_layers: Least = 0
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: Least = 256
    vocab_size_per_layer_input: Size = 262_144
    enable_moe_block: bool = False
    num_experts: Size | None = Field(default=None, le=1 << 20)
    top_k_experts: Size | None = None
    moe_intermediate_size: Size | None = None


class Gemma4(Family[Fields]):
    """Full layers have wider heads; the last layers may share keys and values; layers may have inputs of their own."""

    name = "gemma4"
    text_type = reference_type = mlx_type = "gemma4_text"
    whole_type = gguf = "gemma4"
    whole_class = "Gemma4ForConditionalGeneration"
    reference_class = "Gemma4ForCausalLM"
    wording = Wording(("<|turn>", "<turn|>"), eos="<eos>", markup=MARKUP)
    facts = FACTS
    fields = Fields
    default_vocabulary = 262_144
    default_window = 512
    norm_offset = 0.0
    value_norm = True
    partial_rope = True
    gguf_owners = 2  # gemma4.cpp takes the last two before the shared ones for their donors
    layer_scalar = True

    def refused(self, fields: Fields) -> dict[str, bool]:
        experts = (fields.num_experts, fields.top_k_experts, fields.moe_intermediate_size)
        return {
            **fields.refused(),
            "every layer would share keys and values": fields.num_kv_shared_layers >= fields.num_hidden_layers,
            # transformers would make a full one of it.
            "the last layer is a sliding one": fields.types()[-1:] == [SLIDING],
            "it has experts, and does not say how many and how large": fields.enable_moe_block and None in experts,
            "a token goes through more experts than there are": (fields.top_k_experts or 0)
            > (fields.num_experts or fields.top_k_experts or 0),
        }

    def layers(self, fields: Fields) -> tuple[Layer, ...]:
        types = fields.types()
        first_shared = fields.num_hidden_layers - fields.num_kv_shared_layers
        layers = []
        for index, kind in enumerate(types):
            sliding, shared = kind == SLIDING, index >= first_shared
            head_dim, kv_heads = self._heads(fields, index, sliding)
            # A shared layer reads the last layer of its own attention type that computes keys and values.
            donors = [i for i in range(first_shared) if types[i] == kind]
            if shared and not donors:
                raise ValueError(f"layer {index} shares the keys of a {kind} layer, and there is none")
            layers.append(
                Layer(
                    index=index,
                    sliding=sliding,
                    head_dim=head_dim,
                    kv_heads=kv_heads,
                    intermediate_size=fields.intermediate_size * (2 if shared and fields.use_double_wide_mlp else 1),
                    rope=self._rope(fields, kind, head_dim),
                    kv_source=donors[-1] if shared else index,
                    k_eq_v=fields.attention_k_eq_v and not sliding,
                )
            )
        return tuple(layers)

    def _heads(self, fields: Fields, index: int, sliding: bool) -> tuple[int, int]:
        """Head size and key/value heads of a layer."""
        usual = fields.head_dim, fields.num_key_value_heads
        if fields.per_layer_config is not None:
            own = fields.per_layer_config.get(index, OwnFields())
            return own.head_dim or usual[0], own.num_key_value_heads or usual[1]
        if sliding:
            return usual
        kv_heads = fields.num_global_key_value_heads if fields.attention_k_eq_v else None
        return fields.global_head_dim or GLOBAL_HEAD_DIM, kv_heads or fields.num_key_value_heads

    def _rope(self, fields: Fields, kind: str, head_dim: int) -> Rope:
        return rope((fields.rope_parameters or {}).get(kind) or ROPES[kind], head_dim)

    def own_config(self, flat: Flat) -> dict[str, Any]:
        slides = flat["sliding"]
        kinds = ("shared", "k_eq_v", "final_softcap", "per_layer.dim", "per_layer.vocab_size")
        return {
            **spelt(flat, *kinds),
            **self._spelt_heads(flat),
            **self._spelt_experts(flat),
            "rope_parameters": {
                FULL: spelt_rope(flat, "full"),
                # Of no layer, where none slides.
                SLIDING: spelt_rope(flat, "sliding") if any(slides) else {**ROPES[SLIDING], "rope_type": "default"},
            },
            "use_double_wide_mlp": flat["intermediate_size"][-1] == 2 * flat["intermediate_size"][0],
        }

    def _spelt_heads(self, flat: Flat) -> dict[str, Any]:
        """Heads in the spelling of released checkpoints where that can say it, else one layer at a time."""
        usual, other = key_value_heads(flat)
        common = {"head_dim": flat["sliding.head_dim"], "num_key_value_heads": usual}
        wide = flat["full.head_dim"]
        if flat["k_eq_v"] or usual == other:
            heads = other if flat["k_eq_v"] else None
            return {**common, "global_head_dim": wide, "num_global_key_value_heads": heads}
        own = {"head_dim": wide, "num_key_value_heads": other}
        full = [index for index, slides in enumerate(flat["sliding"]) if not slides]
        return {**common, "per_layer_config": {str(index): own for index in full}}

    def _spelt_experts(self, flat: Flat) -> dict[str, Any]:
        if not flat["experts.count"]:
            return {"enable_moe_block": False}
        sizes = spelt(flat, "experts.count", "experts.top_k", "experts.intermediate_size")
        return {"enable_moe_block": True, **sizes}

    def mlx_problem(self, flat: Flat) -> str | None:
        usual, other = key_value_heads(flat)
        differ = usual != other and not flat["k_eq_v"]
        return "has more key/value heads in one attention type than in the other" if differ else None

    def attention_scale(self, fields: Fields) -> float:
        return 1.0

    def gguf_attention_scale(self, layers: int, head_dim: int, hidden: int, heads: int) -> float:
        return 1.0

    def per_layer(self, fields: Fields) -> PerLayerEmbeddings | None:
        dim = fields.hidden_size_per_layer_input
        if not dim:
            return None
        return PerLayerEmbeddings(
            dim=dim,
            vocab_size=fields.vocab_size_per_layer_input,
            embed_scale=dim**0.5,
            projection_scale=fields.hidden_size**-0.5,
        )

    def experts(self, fields: Fields) -> Experts | None:
        if not fields.enable_moe_block:
            return None
        # `refused` looked whether one is missing.
        sizes = {"count": fields.num_experts, "top_k": fields.top_k_experts}
        return Experts.model_validate({**sizes, "intermediate_size": fields.moe_intermediate_size})
