"""config.json as mlx-lm's `gemma3_text` and `gemma4_text` read it: the older spelling, and nothing left to defaults.

mlx-lm's defaults are not those of transformers, and it knows attention types by one pattern and head sizes by one
number for each type. A decoder that cannot be said so is refused (`problem`) rather than run wrongly there.
"""

from __future__ import annotations

from typing import Any

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.architecture import Architecture, Experts, Layer, Rope
from gemexport.formats.gemma.model import Model

# How weights were stored, not what the decoder is; and `per_layer_config`, which is the newer spelling.
DROPPED = (
    "per_layer_config",
    "dtype",
    "torch_dtype",
    "quantization",
    "quantization_config",
    "transformers_version",
)


def text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json for the decoder alone, without quantization; of a decoder that mlx-lm has a way to say."""
    decoder = checkpoint.architecture
    kept = {key: value for key, value in checkpoint.text_config.items() if key not in DROPPED}
    own = _gemma3(checkpoint) if not checkpoint.model.family.partial_rope else _gemma4(checkpoint)
    return {
        **kept,
        "architectures": [checkpoint.model.family.reference_class],
        "hidden_size": decoder.hidden_size,
        "intermediate_size": min(layer.intermediate_size for layer in decoder.layers),
        "layer_types": ["sliding_attention" if layer.sliding else "full_attention" for layer in decoder.layers],
        "max_position_embeddings": decoder.max_positions,
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": len(decoder.layers),
        "rms_norm_eps": decoder.rms_norm_eps,
        "sliding_window": decoder.sliding_window,
        "tie_word_embeddings": decoder.tied,
        "vocab_size": decoder.vocab_size,
        **own,
    }


def _gemma3(checkpoint: Checkpoint) -> dict[str, Any]:
    decoder = checkpoint.architecture
    sliding, full = _kinds(decoder)
    first = decoder.layers[0]
    own: dict[str, Any] = {
        "head_dim": first.head_dim,
        "num_key_value_heads": first.kv_heads,
        "query_pre_attn_scalar": checkpoint.text_config.get("query_pre_attn_scalar", 256),
        "rope_scaling": None,
        "sliding_window_pattern": _pattern(decoder),
    }
    if sliding is not None:
        own["rope_local_base_freq"] = sliding.rope.theta
    if full is not None:
        own["rope_theta"] = full.rope.theta
        if full.rope.factor != 1.0:
            own["rope_scaling"] = {"rope_type": "linear", "factor": full.rope.factor}
    return own


def _gemma4(checkpoint: Checkpoint) -> dict[str, Any]:
    decoder = checkpoint.architecture
    sliding, full = _kinds(decoder)
    first, last = sliding or decoder.layers[0], full or decoder.layers[-1]
    shared = sum(not layer.owns_cache for layer in decoder.layers)
    k_eq_v = any(layer.k_eq_v for layer in decoder.layers)
    return {
        "attention_k_eq_v": k_eq_v,
        **_experts(decoder.experts),
        "final_logit_softcapping": decoder.final_softcap,
        "global_head_dim": last.head_dim,
        "head_dim": first.head_dim,
        "hidden_size_per_layer_input": decoder.per_layer.dim if decoder.per_layer else 0,
        "num_global_key_value_heads": last.kv_heads if k_eq_v else None,
        "num_key_value_heads": first.kv_heads,
        "num_kv_shared_layers": shared,
        "rope_parameters": {
            "full_attention": _rope(last.rope, last.head_dim),
            "sliding_attention": _rope(first.rope, first.head_dim),
        },
        "use_double_wide_mlp": len({layer.intermediate_size for layer in decoder.layers}) > 1,
        "vocab_size_per_layer_input": decoder.per_layer.vocab_size if decoder.per_layer else decoder.vocab_size,
    }


def _experts(experts: Experts | None) -> dict[str, Any]:
    if experts is None:
        return {"enable_moe_block": False}
    return {
        "enable_moe_block": True,
        "moe_intermediate_size": experts.intermediate_size,
        "num_experts": experts.count,
        "top_k_experts": experts.top_k,
    }


def problem(model: Model) -> str | None:
    """What of a decoder mlx-lm has no way to say, as a predicate of the model."""
    decoder = model.decoder
    sliding, full = _kinds(decoder)
    for layer in decoder.layers:
        other = sliding if layer.sliding else full
        assert other is not None
        if (layer.head_dim, layer.kv_heads, layer.rope) != (other.head_dim, other.kv_heads, other.rope):
            return f"has layers of one attention type that differ ({other.index}, {layer.index})"
    first, last = sliding or decoder.layers[0], full or decoder.layers[-1]
    if model.family.partial_rope:
        differ = last.kv_heads != first.kv_heads and not any(layer.k_eq_v for layer in decoder.layers)
        return "has more key/value heads in one attention type than in the other" if differ else None
    problems = {
        "has a soft cap": decoder.final_softcap is not None or decoder.attention_softcap is not None,
        "scales the positions of sliding layers": sliding is not None and sliding.rope.factor != 1.0,
        "does not repeat one pattern of sliding and full attention": _pattern(decoder) is None,
    }
    return next((problem for problem, present in problems.items() if present), None)


def _kinds(decoder: Architecture) -> tuple[Layer | None, Layer | None]:
    """A sliding and a full layer to speak for all of their kind."""
    sliding = next((layer for layer in decoder.layers if layer.sliding), None)
    return sliding, next((layer for layer in decoder.layers if not layer.sliding), None)


def _pattern(decoder: Architecture) -> int | None:
    """Every how many layers one is a full one, the last of each run; None when there is no such number."""
    layers = decoder.layers
    pattern = next((layer.index + 1 for layer in layers if not layer.sliding), 0)
    if not pattern or any(layer.sliding == ((layer.index + 1) % pattern == 0) for layer in layers):
        return None
    return pattern


def _rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    if rope.rotary_dims != head_dim:
        part = rope.rotary_dims / head_dim
        spelt = {"rope_type": "proportional", "partial_rotary_factor": part, "rope_theta": rope.theta}
        return spelt | ({"factor": rope.factor} if rope.factor != 1.0 else {})
    if rope.factor != 1.0:
        return {"rope_type": "linear", "rope_theta": rope.theta, "factor": rope.factor}
    return {"rope_type": "default", "rope_theta": rope.theta}
