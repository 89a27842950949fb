"""genai_config.json, by which onnxruntime-genai knows how to drive a graph (https://onnxruntime.ai/docs/genai)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemexport.formats.gemma.facts import GENAI, flat_facts
from gemexport.formats.gemma.model import Model

# Settings of generation_config.json that onnxruntime-genai has under the same names.
SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


def genai_config(model: Model, filename: str, generation: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a decoder in the one graph `filename`.

    `generation` is the checkpoint's generation_config.json, which onnxruntime-genai does not read: where answers end
    and how tokens are chosen comes from there. A chat model's config.json often names <eos> alone, not its turns' end.

    Only layers with a cache of their own are counted: they come first, so their numbers run from 0. Where layers
    differ, the runtime takes the shape of a cache from the graph's inputs; `head_size` is then that of the first.
    """
    a, flat = model.decoder, flat_facts(model.decoder)
    owners = [layer for layer in a.layers if layer.owns_cache]
    said: dict[str, dict[str, Any]] = {"": {}, "decoder": {}}
    for name, key in GENAI.items():
        part, _, own = key.rpartition(".")
        said[part][own] = flat[name]
    decoder = {
        **said["decoder"],
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": owners[0].head_dim,
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
        "num_key_value_heads": owners[0].kv_heads,
    }
    listed = generation.get("eos_token_id")
    eos = [listed] if isinstance(listed, int) else listed or list(a.eos_token_ids) or [1]
    return {
        "model": {
            "bos_token_id": 2 if a.bos_token_id is None else a.bos_token_id,
            "context_length": a.max_positions,
            "decoder": decoder,
            "eos_token_id": eos,
            "pad_token_id": eos[0] if a.pad_token_id is None else a.pad_token_id,
            "type": model.family.genai_type,
            **said[""],
        },
        "search": {
            **_sampling(generation),
            "max_length": a.max_positions,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
        },
    }


def _sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens are chosen: the likeliest one, unless `generation` says to sample."""
    if generation.get("do_sample") is not True:
        return {"do_sample": False}
    given = {name: generation.get(name) for name in SAMPLING}
    return {"do_sample": True, **{name: value for name, value in given.items() if isinstance(value, (int, float))}}
