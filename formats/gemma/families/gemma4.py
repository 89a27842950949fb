"""Gemma 4, as transformers' modeling_gemma4.py and configuration_gemma4.py have it.

transformers 5.23 keeps what differs between layers in `per_layer_config`; older configs say `global_head_dim` and
`num_global_key_value_heads`. Both become the same layers here.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from gemexport.formats.gemma.architecture import Experts, Layer, PerLayerEmbeddings, Rope
from gemexport.formats.gemma.families.family import Family, Wording, rope
from gemexport.formats.gemma.fields import FULL, SLIDING, Least, Size, TextFields

ROPES: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
GLOBAL_HEAD_DIM = 512
MARKUP = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')


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
