"""The metadata that tells llama.cpp which Gemma decoder a GGUF file holds.

llama.cpp's graphs for Gemma 2, 3 and 4 (src/models/gemma2.cpp and its like) have some choices built in: which layer a
shared layer takes its keys from, the attention scale, which layers slide. What they cannot express is refused here.
"""

from __future__ import annotations

import numpy as np
from gguf.constants import GGML_QUANT_VERSION, Keys, LlamaFileType

from gemexport.formats.gemma.facts import flat_facts
from gemexport.formats.gemma.model import Model
from gemexport.formats.gguf import PER_LAYER_ROWS, Q_NORM_FACTOR
from gemexport.formats.gguf.config import NOT_ROTATED
from gemexport.formats.gguf.container import Value, float32, string, uint32
from gemexport.formats.gguf.facts import stated
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
    if (own := model.family.gguf_problem(flat_facts(decoder))) is not None:
        return own
    problems = {
        "its attention scores are soft-capped": decoder.attention_softcap is not None
        and not model.family.caps_attention,
        "its attention scale is not the one that is built in": not decoder.qk_norm and q_norm_factor(model) != 1.0,
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
        and tables.vocab_size != decoder.vocab_size
        and not (model.family.gguf_pads_tables and tables.vocab_size < decoder.vocab_size),
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


def metadata(model: Model, name: str, variant: str) -> dict[str, Value]:
    """Keys and values of the decoder (everything but the tokenizer), in the order in which they are written."""
    values = {
        Keys.General.ARCHITECTURE: string(model.family.gguf),
        Keys.General.TYPE: string("model"),
        Keys.General.NAME: string(name),
        Keys.General.FILE_TYPE: uint32(FILE_TYPES[variant]),
        Keys.General.QUANTIZATION_VERSION: uint32(GGML_QUANT_VERSION),
        **stated(model.family, flat_facts(model.decoder, model.embedder)),
    }
    tables = model.decoder.per_layer
    if tables is not None and tables.vocab_size < model.decoder.vocab_size:
        values[PER_LAYER_ROWS] = uint32(tables.vocab_size)
    factor = q_norm_factor(model)
    if factor != 1.0:
        values[Q_NORM_FACTOR] = float32(factor)
    return {key.format(arch=model.family.gguf): value for key, value in values.items()}
