"""config.json as mlx-lm's `gemma3_text` and `gemma4_text` read it: the older spelling, and nothing left to defaults.

mlx-lm's defaults are not those of transformers, and it knows attention types by one pattern and head sizes by one
number for each type. A decoder that cannot be said so is refused (`problem`) rather than run wrongly there.
"""

from __future__ import annotations

from typing import Any

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.facts import flat_facts, kinds
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
    model, source = checkpoint.model, checkpoint.text_config
    flat = flat_facts(model.decoder)
    config = {
        **{key: value for key, value in source.items() if key not in DROPPED},
        "architectures": [model.family.reference_class],
        "sliding_window": model.decoder.sliding_window,
        **model.family.config(flat),
        **model.family.mlx_config(flat, source),
    }
    return model.family.mlx_whole(config)


def problem(model: Model) -> str | None:
    """What of a decoder mlx-lm has no way to say, as a predicate of the model."""
    decoder = model.decoder
    sliding, full = kinds(decoder)
    for layer in decoder.layers:
        other = sliding if layer.sliding else full
        assert other is not None
        if (layer.head_dim, layer.kv_heads, layer.rope) != (other.head_dim, other.kv_heads, other.rope):
            return f"has layers of one attention type that differ ({other.index}, {layer.index})"
    if decoder.attention_softcap is not None and not model.family.caps_attention:
        return "has a soft cap"
    return model.family.mlx_problem(flat_facts(decoder))
