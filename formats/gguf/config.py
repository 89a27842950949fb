"""The config.json that a GGUF file's metadata stands for, in transformers' spelling.

What the metadata leave out is what llama.cpp's graphs have built in (src/models/gemma3.cpp and gemma4.cpp): the pattern
of sliding layers, the attention scale, Gemma 4's shared layers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import Keys, RopeScalingType, TokenType

from gemexport.formats.gemma.families.family import Family
from gemexport.formats.gemma.model import Model, describe
from gemexport.formats.gguf import FLOATS, family_of, layers_of, q_norm_factor_of
from gemexport.formats.gguf.container import MENDED
from gemexport.formats.gguf.metadata import Metadata
from gemexport.formats.gguf.parts import Parts
from gemexport.formats.storage.errors import InputError

ROPE_FREQUENCIES = "rope_freqs.weight"
EMBEDDING, PER_LAYER_EMBEDDING, HEAD = "token_embd.weight", "per_layer_token_embd.weight", "output.weight"
NOT_ROTATED = 1e30  # a divisor that makes an angle vanish: how llama.cpp leaves pairs of a head unrotated
GEMMA3_PATTERN = 6  # llama.cpp's default for Gemma 3: every sixth layer sees everything
GEMMA4_SOFTCAP = 30.0  # llama.cpp's default for Gemma 4; 0 stands for none
SLIDING_THETA = 10_000.0
# Ollama's converter has names of its own for the bases of Gemma 3's sliding and full layers (convert_gemma3.go).
OLLAMA_LOCAL, OLLAMA_GLOBAL = "{arch}.rope.local.freq_base", "{arch}.rope.global.freq_base"
SLIDING, FULL = "sliding_attention", "full_attention"
HEAD_KEYS = (Keys.Attention.KEY_LENGTH, Keys.Attention.VALUE_LENGTH, Keys.Rope.DIMENSION_COUNT)
SLIDING_HEAD_KEYS = (Keys.Attention.KEY_LENGTH_SWA, Keys.Attention.VALUE_LENGTH_SWA, Keys.Rope.DIMENSION_COUNT_SWA)

EOS_IDS = "gemexport.eos_token_ids"
"""Metadata key (uint32 array): every token that ends an answer, where llama.cpp's two keys cannot say it."""
# Tokens that llama.cpp takes for the end of a turn by their text, where no key says so (src/llama-vocab.cpp).
TURN_ENDS = ("<end_of_turn>", "<turn|>")


def config_json(parts: Parts) -> dict[str, Any]:
    """The config of the decoder in a GGUF file; InputError for metadata that are missing or contradict each other."""
    family, layers = family_of(parts), layers_of(parts)
    facts = Metadata(parts.path, parts.metadata, family.gguf)
    types = _types(facts, family, layers)
    vocabulary = _rows(parts, EMBEDDING)
    config: dict[str, Any] = {
        "architectures": [family.reference_class],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": _dtype(parts),
        "final_logit_softcapping": _softcap(facts, family),
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": facts.count(Keys.LLM.EMBEDDING_LENGTH),
        "layer_types": types,
        "max_position_embeddings": facts.count(Keys.LLM.CONTEXT_LENGTH),
        "model_type": family.reference_type,
        "num_attention_heads": facts.count(Keys.Attention.HEAD_COUNT),
        "num_hidden_layers": layers,
        "rms_norm_eps": facts.positive(Keys.Attention.LAYERNORM_RMS_EPS),
        "tie_word_embeddings": HEAD not in parts.stored,
        "use_cache": True,
        "vocab_size": vocabulary,
    }
    if SLIDING in types:
        config["sliding_window"] = facts.count(Keys.Attention.SLIDING_WINDOW)
    config |= _special_ids(facts, parts, vocabulary)
    config |= _gemma4(facts, parts, config) if family.partial_rope else _gemma3(facts, config)
    # A factor in the query norms stands for another attention scale than llama.cpp's; see exporters/gguf/facts.
    if not family.partial_rope:
        config["query_pre_attn_scalar"] = _scalar(family, config, q_norm_factor_of(parts))
    _check(facts, config)
    return config


def _types(facts: Metadata, family: Family[Any], layers: int) -> list[str]:
    """Which layers slide: an array of truth values, or a period (Gemma 3 only)."""
    key = Keys.Attention.SLIDING_WINDOW_PATTERN
    if not family.partial_rope and facts.count(Keys.Attention.SLIDING_WINDOW, 0, least=0) == 0:
        return [FULL] * layers
    if family.partial_rope or facts.has_array(key):
        slides = facts.array(key, layers, "biu", "truth values, one a layer of block_count")
    else:
        period = facts.count(key, GEMMA3_PATTERN, least=0)
        slides = [period == 0 or (index + 1) % period != 0 for index in range(layers)]
    return [SLIDING if one else FULL for one in slides]


def _softcap(facts: Metadata, family: Family[Any]) -> float | None:
    cap = facts.number(Keys.LLM.FINAL_LOGIT_SOFTCAPPING, GEMMA4_SOFTCAP if family.partial_rope else 0.0)
    if cap < 0:
        raise facts.wrong(Keys.LLM.FINAL_LOGIT_SOFTCAPPING, "0 or more")
    return cap or None


def _gemma3(facts: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    factor = facts.number(Keys.Rope.SCALING_FACTOR, facts.number("{arch}.rope.scale_linear", 0.0))
    kind = facts.text(Keys.Rope.SCALING_TYPE, RopeScalingType.LINEAR.value)
    scaled = factor not in (0.0, 1.0) and kind != RopeScalingType.NONE.value
    if scaled and (kind != RopeScalingType.LINEAR.value or factor < 0):
        raise facts.wrong(Keys.Rope.SCALING_TYPE, "linear")
    return {
        "attn_logit_softcapping": None,
        "head_dim": _head_dim(facts, config, *HEAD_KEYS),
        "intermediate_size": facts.count(Keys.LLM.FEED_FORWARD_LENGTH),
        "num_key_value_heads": facts.count(Keys.Attention.HEAD_COUNT_KV, config["num_attention_heads"]),
        "rope_local_base_freq": facts.positive(Keys.Rope.FREQ_BASE_SWA, facts.positive(OLLAMA_LOCAL, SLIDING_THETA)),
        "rope_scaling": {"factor": factor, "rope_type": "linear"} if scaled else None,
        "rope_theta": facts.positive(Keys.Rope.FREQ_BASE, facts.positive(OLLAMA_GLOBAL, SLIDING_THETA)),
        "use_bidirectional_attention": False,
    }


def _gemma4(facts: Metadata, parts: Parts, config: dict[str, Any]) -> dict[str, Any]:
    types, layers = config["layer_types"], config["num_hidden_layers"]
    shared = facts.count(Keys.Attention.SHARED_KV_LAYERS, 0, least=0)
    wide = facts.counts(Keys.LLM.FEED_FORWARD_LENGTH, layers)
    full, sliding = _head_dim(facts, config, *HEAD_KEYS), _head_dim(facts, config, *SLIDING_HEAD_KEYS)
    per_layer = facts.count(Keys.LLM.EMBD_LENGTH_PER_LAYER_INP, 0, least=0)
    return {
        **_key_value_heads(facts, parts, types, full, sliding),
        **_experts(facts),
        "head_dim": sliding,
        "hidden_size_per_layer_input": per_layer,
        "intermediate_size": wide[0],
        "num_kv_shared_layers": shared,
        "rope_parameters": {
            FULL: _proportional(facts, parts, full),
            SLIDING: {"rope_theta": facts.positive(Keys.Rope.FREQ_BASE_SWA, SLIDING_THETA), "rope_type": "default"},
        },
        "use_double_wide_mlp": wide[-1] == 2 * wide[0],
        "vocab_size_per_layer_input": _rows(parts, PER_LAYER_EMBEDDING) if per_layer else config["vocab_size"],
    }


def _experts(facts: Metadata) -> dict[str, Any]:
    count = facts.count(Keys.LLM.EXPERT_COUNT, 0, least=0)
    if not count:
        return {"enable_moe_block": False}
    return {
        "enable_moe_block": True,
        "moe_intermediate_size": facts.count(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH),
        "num_experts": count,
        "top_k_experts": facts.count(Keys.LLM.EXPERT_USED_COUNT),
    }


def _head_dim(facts: Metadata, config: dict[str, Any], key: str, *others: str) -> int:
    """A head's size; the keys that say how large its values are, and how much of it rotates, must say the same."""
    size = facts.count(key, max(1, config["hidden_size"] // config["num_attention_heads"]))
    for other in others:
        if facts.count(other, size) != size:
            raise facts.wrong(other, f"{size}, the size of a head's keys")
    return size


def _key_value_heads(facts: Metadata, parts: Parts, types: list[str], full: int, sliding: int) -> dict[str, Any]:
    """Key/value heads, in the spelling of released checkpoints where that can say it, else one layer at a time."""
    heads = facts.counts(Keys.Attention.HEAD_COUNT_KV, len(types), facts.count(Keys.Attention.HEAD_COUNT))
    by_type = {kind: {count for count, own in zip(heads, types, strict=True) if own == kind} for kind in types}
    if any(len(counts) > 1 for counts in by_type.values()):
        raise facts.wrong(Keys.Attention.HEAD_COUNT_KV, "the same for all layers of one attention type")
    usual = next(iter(by_type.get(SLIDING) or by_type[FULL]))
    other = next(iter(by_type.get(FULL) or by_type[SLIDING]))
    every = [index for index, kind in enumerate(types) if kind == FULL]
    owners = [index for index in every if f"blk.{index}.attn_k.weight" in parts.stored]
    # Values that are the keys: llama.cpp knows it by the matrix that is not there.
    same = bool(owners) and not any(f"blk.{index}.attn_v.weight" in parts.stored for index in owners)
    common = {"attention_k_eq_v": same, "num_key_value_heads": usual}
    if same or usual == other:
        return {**common, "global_head_dim": full, "num_global_key_value_heads": other if same else None}
    own = {"head_dim": full, "num_key_value_heads": other}
    return {**common, "per_layer_config": {str(index): own for index in every}}


def _proportional(facts: Metadata, parts: Parts, head_dim: int) -> dict[str, Any]:
    """RoPE of the full layers: the divisors in the file tell which pairs turn, and how much slower."""
    theta = facts.positive(Keys.Rope.FREQ_BASE, 1_000_000.0)
    if ROPE_FREQUENCIES not in parts.stored:
        raise InputError(facts.path, f"there is no tensor {ROPE_FREQUENCIES}", "give the file of a whole model")
    container, stored = parts.stored[ROPE_FREQUENCIES]
    if stored.type != Type.F32 or stored.shape != (head_dim // 2,):
        problem = f"{ROPE_FREQUENCIES} is {stored.type.name} {list(stored.shape)} and should be F32 [{head_dim // 2}]"
        raise InputError(facts.path, problem, MENDED)
    divisors = container.rows(stored, 0, 1).view("<f4")[0]
    turned = int((divisors < NOT_ROTATED / 10).sum())
    factor = float(str(divisors[0])) if turned else 1.0
    same = (divisors[:turned] == np.float32(factor)).all() and (divisors[turned:] >= NOT_ROTATED / 10).all()
    if not same or factor <= 0:
        raise InputError(facts.path, f"{ROPE_FREQUENCIES} is not of proportional RoPE", MENDED)
    part = 2 * turned / head_dim
    if int(part * head_dim // 2) < turned:  # the product must not be rounded below what it was divided from
        part = math.nextafter(part, 2.0)
    found = {"partial_rotary_factor": part, "rope_theta": theta, "rope_type": "proportional"}
    return found if factor == 1.0 else {**found, "factor": factor}


def _scalar(family: Family[Any], config: dict[str, Any], factor: float) -> float:
    """`query_pre_attn_scalar`: the shortest number of which llama.cpp's scale times `factor` is the root's inverse."""
    sizes = (config[key] for key in ("num_hidden_layers", "head_dim", "hidden_size", "num_attention_heads"))
    built_in = family.gguf_attention_scale(*sizes)
    exact = (built_in * factor) ** -2
    for digits in range(1, 17):
        candidate = float(f"{exact:.{digits}g}")
        if np.float32(candidate**-0.5 / built_in) == np.float32(factor):
            return int(candidate) if candidate.is_integer() else candidate
    return exact


def _special_ids(facts: Metadata, parts: Parts, size: int) -> dict[str, Any]:
    """Ids of BOS, padding and the tokens that end an answer; what lies outside the vocabulary counts as missing."""
    stops = [facts.index(key, size) for key in (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)]
    if not facts.has(Keys.Tokenizer.EOT_ID) and facts.has(Keys.Tokenizer.CHAT_TEMPLATE):
        stops.append(_turn_end(facts, size))
    if facts.has(EOS_IDS):
        listed = parts.metadata[EOS_IDS]
        if not isinstance(listed, np.ndarray) or listed.dtype.kind != "u" or not (listed < size).all():
            raise facts.wrong(EOS_IDS, "token ids")
        stops = listed.tolist()
    ends = list(dict.fromkeys(stop for stop in stops if stop is not None))
    return {
        "bos_token_id": facts.index(Keys.Tokenizer.BOS_ID, size),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": facts.index(Keys.Tokenizer.PAD_ID, size),
    }


def _turn_end(facts: Metadata, size: int) -> int | None:
    """The control token that ends a turn of a chat model, by its text."""
    kinds = facts.array(Keys.Tokenizer.TOKEN_TYPE, size, "iu", "token types")
    texts = facts.texts(Keys.Tokenizer.LIST)
    control = int(TokenType.CONTROL)
    return next((index for index, kind in enumerate(kinds) if kind == control and texts[index] in TURN_ENDS), None)


def _rows(parts: Parts, name: str) -> int:
    """Rows of a table that the model cannot do without."""
    if name not in parts.stored or len(parts.stored[name][1].shape) != 2:
        raise InputError(parts.path, f"there is no matrix {name}", "give the file of a whole model")
    return parts.stored[name][1].shape[0]


def _dtype(parts: Parts) -> str:
    """What the matrices are stored in when it is one dtype, else float32."""
    kinds = {stored.type for _, stored in parts.stored.values() if len(stored.shape) == 2}
    found = FLOATS.get(kinds.pop()) if len(kinds) == 1 else None
    return {"bf16": "bfloat16", "f16": "float16"}.get(found or "", "float32")


def _check(facts: Metadata, config: dict[str, Any]) -> None:
    """Raise InputError where the metadata say what a config cannot."""
    decoder = model_of(facts, config).decoder
    layers = config["num_hidden_layers"]
    said = {
        Keys.LLM.FEED_FORWARD_LENGTH: [layer.intermediate_size for layer in decoder.layers],
        Keys.Attention.HEAD_COUNT_KV: [layer.kv_heads for layer in decoder.layers],
    }
    for key, meant in said.items():
        default = config["num_attention_heads"] if key == Keys.Attention.HEAD_COUNT_KV else None
        if facts.counts(key, layers, default) != meant:
            raise facts.wrong(key, "what block_count and attention.shared_kv_layers make of it")


def model_of(facts: Metadata, config: dict[str, Any]) -> Model:
    """The model of a config; an InputError is about the GGUF file, which has no config.json to mend."""
    try:
        return describe(config, facts.path)
    except InputError as error:
        raise InputError(facts.path, error.problem, MENDED) from error
