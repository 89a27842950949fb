"""The config.json that a GGUF file's metadata stands for, in transformers' spelling.

What the metadata leave out is what llama.cpp's graphs have built in (src/models/gemma3.cpp and gemma4.cpp): the pattern
of sliding layers, the attention scale, Gemma 4's shared layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import Keys, RopeScalingType, TokenType

from gemexport.formats.gemma.architecture import Architecture
from gemexport.formats.gemma.facts import Flat, Form, flat_facts
from gemexport.formats.gemma.families.family import Family
from gemexport.formats.gemma.model import Model, describe
from gemexport.formats.gguf import FLOATS, PER_LAYER_ROWS, ROPE_FREQUENCIES, family_of, layers_of, q_norm_factor_of
from gemexport.formats.gguf.container import MENDED
from gemexport.formats.gguf.facts import read_facts
from gemexport.formats.gguf.metadata import Metadata
from gemexport.formats.gguf.parts import Parts
from gemexport.formats.storage.errors import InputError

EMBEDDING, PER_LAYER_EMBEDDING, HEAD = "token_embd.weight", "per_layer_token_embd.weight", "output.weight"
# What is F32 in any file, after the name of its layer.
SMALL = tuple(
    f".{kind}.weight" for kind in ("ffn_gate_inp", "altup_router", "altup_predict_coef", "altup_correct_coef")
)
NOT_ROTATED = 1e30  # a divisor that makes an angle vanish: how llama.cpp leaves pairs of a head unrotated

EOS_IDS = "gemexport.eos_token_ids"
"""Metadata key (uint32 array): every token that ends an answer, where llama.cpp's two keys cannot say it."""
# Tokens that llama.cpp takes for the end of a turn by their text, where no key says so (src/llama-vocab.cpp).
TURN_ENDS = ("<end_of_turn>", "<turn|>")


def config_json(parts: Parts) -> dict[str, Any]:
    """The config of the decoder in a GGUF file; InputError for metadata that are missing or contradict each other."""
    family, layers = family_of(parts), layers_of(parts)
    facts = Metadata(parts.path, parts.metadata, family.gguf)
    flat = read_facts(family, facts, layers)
    _check_window(facts, flat)
    flat |= _stored_facts(parts, flat)
    flat |= _full_rope(family, facts, parts, flat)
    config: dict[str, Any] = {
        **family.config(flat),
        **family.file_config(flat, q_norm_factor_of(parts)),
        "architectures": [family.reference_class],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": _dtype(parts),
        "final_logit_softcapping": flat["final_softcap"],
        "hidden_activation": "gelu_pytorch_tanh",
        "model_type": family.reference_type,
        "use_cache": True,
        **_special_ids(facts, parts, flat["vocab_size"]),
    }
    if any(flat["sliding"]):
        config["sliding_window"] = flat["sliding_window"]
    _check(family, facts, flat, model_of(facts, config).decoder)
    return config


def _check_window(facts: Metadata, flat: Flat) -> None:
    """Raise InputError for layers that slide without a window."""
    if any(flat["sliding"]) and not flat["sliding_window"]:
        raise facts.wrong(Keys.Attention.SLIDING_WINDOW, "a whole number from 1 up")


def _stored_facts(parts: Parts, flat: Flat) -> Flat:
    """The facts that llama.cpp knows by the tensors that there are."""
    vocabulary = _rows(parts, EMBEDDING)
    full = [index for index, slides in enumerate(flat["sliding"]) if not slides]
    owners = [index for index in full if f"blk.{index}.attn_k.weight" in parts.stored]
    return {
        "vocab_size": vocabulary,
        "tied": HEAD not in parts.stored,
        "per_layer.vocab_size": _told_rows(parts) if flat.get("per_layer.dim") else vocabulary,
        # Values that are the keys: the matrix is not there.
        "k_eq_v": bool(owners) and not any(f"blk.{index}.attn_v.weight" in parts.stored for index in owners),
    }


def _told_rows(parts: Parts) -> int:
    """Rows of the per-layer embeddings that are the model's."""
    found: int = parts.metadata.get(PER_LAYER_ROWS, _rows(parts, PER_LAYER_EMBEDDING))
    return found


def _full_rope(family: Family[Any], facts: Metadata, parts: Parts, flat: Flat) -> Flat:
    """How much of a full layer's head rotates, and how much slower; sliding layers rotate whole."""
    narrow = flat.setdefault("sliding.head_dim", flat["full.head_dim"])
    found = {"sliding.rope.factor": 1.0, "sliding.rope.rotary_dims": narrow}
    if family.partial_rope:
        return found | _proportional(facts, parts, flat["full.head_dim"])
    factor, kind = flat["full.rope.factor"], flat["full.rope.scaling"]
    scaled = factor not in (0.0, 1.0) and kind != RopeScalingType.NONE.value
    if scaled and (kind != RopeScalingType.LINEAR.value or factor < 0):
        raise facts.wrong(Keys.Rope.SCALING_TYPE, "linear")
    return found | {"full.rope.factor": factor if scaled else 1.0, "full.rope.rotary_dims": flat["full.head_dim"]}


def _proportional(facts: Metadata, parts: Parts, head_dim: int) -> Flat:
    """RoPE of the full layers: the divisors in the file tell which pairs turn, and how much slower."""
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
    return {"full.rope.factor": factor, "full.rope.rotary_dims": 2 * turned}


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
    """What the matrices are stored in when it is one dtype, else float32; small ones, which are F32 always, aside."""
    kinds = {
        stored.type for name, (_, stored) in parts.stored.items() if len(stored.shape) >= 2 and not name.endswith(SMALL)
    }
    found = FLOATS.get(kinds.pop()) if len(kinds) == 1 else None
    return {"bf16": "bfloat16", "f16": "float16"}.get(found or "", "float32")


def _check(family: Family[Any], facts: Metadata, flat: Flat, decoder: Architecture) -> None:
    """Raise InputError where the metadata say what a config cannot."""
    meant = flat_facts(decoder)
    for fact in family.facts:
        if fact.form is Form.COUNTS and flat[fact.name] != meant[fact.name]:
            raise facts.wrong(fact.gguf, "what block_count and attention.shared_kv_layers make of it")


def model_of(facts: Metadata, config: dict[str, Any]) -> Model:
    """The model of a config; an InputError is about the GGUF file, which has no config.json to mend."""
    try:
        return describe(config, facts.path)
    except InputError as error:
        raise InputError(facts.path, error.problem, MENDED) from error
