"""genai_config.json, by which onnxruntime-genai knows how to drive a graph (https://onnxruntime.ai/docs/genai)."""

from __future__ import annotations

from typing import Any

from gemexport.formats.architecture import Architecture


def genai_config(a: Architecture, filename: str) -> dict[str, Any]:
    """The configuration of a decoder in the one graph `filename`.

    Only layers with a cache of their own are counted: they come first, so their numbers run from 0. Where layers
    differ, the runtime takes the shape of a cache from the graph's inputs; `head_size` is then that of the first.
    """
    owners = [layer for layer in a.layers if layer.owns_cache]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": owners[0].head_dim,
        "hidden_size": a.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": a.heads,
        "num_hidden_layers": len(owners),
        "num_key_value_heads": owners[0].kv_heads,
    }
    eos = list(a.eos_token_ids) or [1]
    return {
        "model": {
            "bos_token_id": 2 if a.bos_token_id is None else a.bos_token_id,
            "context_length": a.max_positions,
            "decoder": decoder,
            "eos_token_id": eos,
            "pad_token_id": eos[0] if a.pad_token_id is None else a.pad_token_id,
            "type": "gemma3_text",
            "vocab_size": a.vocab_size,
        },
        "search": {
            "do_sample": False,
            "max_length": a.max_positions,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
        },
    }
