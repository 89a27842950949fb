"""The metadata that tells llama.cpp which Gemma decoder a GGUF file holds.

llama.cpp's graphs for Gemma 3 and Gemma 4 (src/models/gemma3.cpp, gemma4.cpp) have some choices built in: which layer a
shared layer takes its keys from, the attention scale, which layers slide. What they cannot express is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gguf.constants import GGML_QUANT_VERSION, Keys, LlamaFileType, RopeScalingType

from gemexport.formats.gemma.architecture import Architecture, Experts, Layer, Rope
from gemexport.formats.gemma.model import Model
from gemexport.formats.gguf import Q_NORM_FACTOR
from gemexport.formats.gguf.config import GEMMA3_PATTERN, NOT_ROTATED
from gemexport.formats.gguf.container import Value, boolean, float32, string, uint32
from gemexport.formats.tensor import Floats

FILE_TYPES = {
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "F32": LlamaFileType.ALL_F32,
    "Q4_K_S": LlamaFileType.MOSTLY_Q4_K_S,
    "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
    "Q5_K_S": LlamaFileType.MOSTLY_Q5_K_S,
    "Q5_K_M": LlamaFileType.MOSTLY_Q5_K_M,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
}


def problem(model: Model) -> str | None:
    """What llama.cpp's graph of this family would compute differently, if anything."""
    decoder = model.decoder
    owners = [layer.index for layer in decoder.layers if layer.owns_cache]
    shared = [layer for layer in decoder.layers if not layer.owns_cache]
    ropes = {sliding: {layer.rope for layer in decoder.layers if layer.sliding == sliding} for sliding in (True, False)}
    in_part = [layer for layer in decoder.layers if layer.rope.rotary_dims != layer.head_dim]
    tables = decoder.per_layer
    problems = {
        "its attention scores are soft-capped": decoder.attention_softcap is not None,
        "it has fewer than two layers that compute keys and values": len(owners) < model.family.gguf_owners,
        "layers of one attention type differ in their RoPE": any(len(rope) > 1 for rope in ropes.values()),
        "the RoPE of its sliding layers is scaled": any(rope.factor != 1.0 for rope in ropes[True]),
        # Proportional RoPE is what the full layers of Gemma 4 have; see rope_frequencies.
        "a head is rotated only in part": any(layer.sliding or not model.family.partial_rope for layer in in_part),
        # gemma4.cpp takes the last two layers before the shared ones: first a sliding one, then a full one.
        "its shared layers do not read the last two layers before them": any(
            layer.kv_source != len(owners) - (2 if layer.sliding else 1) for layer in shared
        ),
        "the per-layer embeddings have another vocabulary than the embeddings": tables is not None
        and tables.vocab_size != decoder.vocab_size,
    }
    return next((problem for problem, present in problems.items() if present), None)


def q_norm_factor(model: Model) -> float:
    """What the query norms must be multiplied by so that llama.cpp's attention scale comes out as the model's.

    Queries are normed, so a factor on the norm's weight is a factor on the scores.
    """
    decoder = model.decoder
    head_dim = decoder.layers[0].head_dim
    built_in = model.family.gguf_attention_scale(len(decoder.layers), head_dim, decoder.hidden_size, decoder.heads)
    factor = float(np.float32(decoder.attention_scale / built_in))
    return 1.0 if abs(factor - 1.0) < 1e-6 else factor


def rope_frequencies(model: Model) -> Floats | None:
    """Divisors `[head_dim / 2]` of the full layers' angles: proportional RoPE turns only the first pairs of a head."""
    full = next((layer for layer in model.decoder.layers if not layer.sliding), None)
    if not model.family.partial_rope or full is None:
        return None
    turned = full.rope.rotary_dims // 2
    divisors = np.full(full.head_dim // 2, NOT_ROTATED, np.float32)
    divisors[:turned] = full.rope.factor
    return divisors


def _one_or_many(values: Sequence[int]) -> Value:
    """A single number when all layers agree, as other converters write it, else one a layer."""
    return uint32(values[0] if len(set(values)) == 1 else list(values))


def metadata(model: Model, name: str, variant: str) -> dict[str, Value]:
    """Keys and values of the decoder (everything but the tokenizer), in the order in which they are written."""
    decoder, arch = model.decoder, model.family.gguf
    layers = decoder.layers
    sliding = next((layer for layer in layers if layer.sliding), None)
    full = next((layer for layer in layers if not layer.sliding), None)
    first = full or layers[0]
    values = {
        Keys.General.ARCHITECTURE: string(arch),
        Keys.General.TYPE: string("model"),
        Keys.General.NAME: string(name),
        Keys.General.FILE_TYPE: uint32(FILE_TYPES[variant]),
        Keys.General.QUANTIZATION_VERSION: uint32(GGML_QUANT_VERSION),
        Keys.LLM.CONTEXT_LENGTH: uint32(decoder.max_positions),
        Keys.LLM.EMBEDDING_LENGTH: uint32(decoder.hidden_size),
        Keys.LLM.BLOCK_COUNT: uint32(len(layers)),
        Keys.LLM.FEED_FORWARD_LENGTH: _one_or_many([layer.intermediate_size for layer in layers]),
        Keys.Attention.HEAD_COUNT: uint32(decoder.heads),
        Keys.Attention.HEAD_COUNT_KV: _one_or_many([layer.kv_heads for layer in layers]),
        Keys.Attention.LAYERNORM_RMS_EPS: float32(decoder.rms_norm_eps),
        Keys.Attention.KEY_LENGTH: uint32(first.head_dim),
        Keys.Attention.VALUE_LENGTH: uint32(first.head_dim),
        Keys.Rope.FREQ_BASE: float32(first.rope.theta),
    }
    if sliding is not None:
        values[Keys.Rope.FREQ_BASE_SWA] = float32(sliding.rope.theta)
    own = _gemma4(decoder, sliding or first, first) if model.family.partial_rope else _gemma3(decoder, first.rope)
    values |= own
    factor = q_norm_factor(model)
    if factor != 1.0:
        values[Q_NORM_FACTOR] = float32(factor)
    return {key.format(arch=arch): value for key, value in values.items()}


def _gemma3(decoder: Architecture, rope: Rope) -> dict[str, Value]:
    values: dict[str, Value] = {}
    pattern = [layer.sliding for layer in decoder.layers]
    if any(pattern):
        values[Keys.Attention.SLIDING_WINDOW] = uint32(decoder.sliding_window)
        if pattern != [bool((i + 1) % GEMMA3_PATTERN) for i in range(len(pattern))]:
            values[Keys.Attention.SLIDING_WINDOW_PATTERN] = boolean(pattern)
    if rope.factor != 1.0:
        values[Keys.Rope.SCALING_TYPE] = string(RopeScalingType.LINEAR.value)
        values[Keys.Rope.SCALING_FACTOR] = float32(rope.factor)
    if decoder.final_softcap is not None:
        values[Keys.LLM.FINAL_LOGIT_SOFTCAPPING] = float32(decoder.final_softcap)
    return values


def _experts(experts: Experts | None) -> dict[str, Value]:
    if experts is None:
        return {}
    return {
        Keys.LLM.EXPERT_COUNT: uint32(experts.count),
        Keys.LLM.EXPERT_USED_COUNT: uint32(experts.top_k),
        Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: uint32(experts.intermediate_size),
    }


def _gemma4(decoder: Architecture, sliding: Layer, full: Layer) -> dict[str, Value]:
    return {
        **_experts(decoder.experts),
        Keys.Attention.SLIDING_WINDOW: uint32(decoder.sliding_window),
        Keys.Attention.SLIDING_WINDOW_PATTERN: boolean([layer.sliding for layer in decoder.layers]),
        Keys.Attention.SHARED_KV_LAYERS: uint32(sum(not layer.owns_cache for layer in decoder.layers)),
        Keys.Attention.KEY_LENGTH_SWA: uint32(sliding.head_dim),
        Keys.Attention.VALUE_LENGTH_SWA: uint32(sliding.head_dim),
        Keys.Rope.DIMENSION_COUNT: uint32(full.head_dim),
        Keys.Rope.DIMENSION_COUNT_SWA: uint32(sliding.head_dim),
        Keys.LLM.EMBD_LENGTH_PER_LAYER_INP: uint32(decoder.per_layer.dim if decoder.per_layer else 0),
        # Without the key llama.cpp would cap at 30; 0 means no cap.
        Keys.LLM.FINAL_LOGIT_SOFTCAPPING: float32(decoder.final_softcap or 0.0),
    }
