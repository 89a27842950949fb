"""Facts of a decoder, one a row: what it is called in a GGUF file and in config.json, and what its absence means.

What a GGUF file's metadata are written from and read into, what a config.json is made of, and what a verdict calls a
fact that is wrong, all come from these rows. Between them and an `Architecture` stand flat facts: a dictionary by the
rows' names, in which what differs between layers is a list, or is said of full and of sliding layers apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from gemexport.formats.gemma.architecture import Architecture, Layer
from gemexport.formats.gemma.embedder import DENSE, Embedder
from gemexport.formats.gemma.fields import FULL, SLIDING

Flat = dict[str, Any]
REQUIRED = object()  # no program does without


class Form(Enum):
    """How a GGUF file has a fact."""

    COUNT = "a whole number from 1 up"
    COUNT_OR_NONE = "a whole number from 0 up"
    COUNTS = "a whole number, or one a layer"
    NUMBER = "a number"
    POSITIVE = "a number above 0"
    CAP = "a number, 0 for none"
    FLAGS = "truth values, one a layer"
    PERIOD = "truth values, one a layer, or every how many layers one is false"
    TEXT = "a text"


@dataclass(frozen=True)
class Fact:
    """A row of a GGUF file's metadata."""

    name: str  # of the flat fact; several keys may say the same one
    form: Form
    gguf: str  # key, with {arch}
    absent: Any | Callable[[Mapping[str, Any]], Any] = REQUIRED  # what llama.cpp takes without the key
    always: bool = True  # it is written though it is what llama.cpp takes anyway
    needs: str = ""  # a flat fact without which there is nothing to say
    others: tuple[str, ...] = ()  # keys that other converters write it under

    def default(self, flat: Mapping[str, Any]) -> Any:
        """What llama.cpp takes without the key, given the facts of the rows before; None when it needs the key."""
        if self.absent is REQUIRED:
            return None
        return self.absent(flat) if callable(self.absent) else self.absent

    def is_said(self, flat: Mapping[str, Any]) -> bool:
        """Whether a file says it."""
        return not self.needs or bool(flat[self.needs])

    def is_written(self, flat: Mapping[str, Any]) -> bool:
        """Whether our files say it."""
        value = flat[self.name]
        if not self.is_said(flat) or (value is None and self.form is not Form.CAP):
            return False
        return self.always or value != self.default(flat)


def flat_facts(decoder: Architecture, embedder: Embedder | None = None) -> Flat:
    """The facts of a decoder, and of what makes one vector of a text after it.

    Of an attention type that it does not have, those of the other.
    """
    sliding, full = kinds(decoder)
    narrow, wide = sliding or full, full or sliding
    assert narrow is not None
    assert wide is not None
    experts, tables, streams = decoder.experts, decoder.per_layer, decoder.streams
    return {
        "layers": len(decoder.layers),
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "heads": decoder.heads,
        "max_positions": decoder.max_positions,
        "rms_norm_eps": decoder.rms_norm_eps,
        "final_softcap": decoder.final_softcap,
        "attention_softcap": decoder.attention_softcap,
        "tied": decoder.tied,
        "sliding": [layer.sliding for layer in decoder.layers],
        "sliding_window": decoder.sliding_window if sliding else 0,
        "intermediate_size": [layer.intermediate_size for layer in decoder.layers],
        "kv_heads": [layer.kv_heads for layer in decoder.layers],
        "owners": sum(layer.owns_cache for layer in decoder.layers),
        "shared": sum(not layer.owns_cache for layer in decoder.layers),
        "k_eq_v": any(layer.k_eq_v for layer in decoder.layers),
        "full.head_dim": wide.head_dim,
        "full.rope.theta": wide.rope.theta,
        "full.rope.factor": wide.rope.factor,
        "full.rope.rotary_dims": wide.rope.rotary_dims,
        "full.rope.scaling": "linear" if wide.rope.factor != 1.0 else None,
        "sliding.head_dim": narrow.head_dim,
        "sliding.rope.theta": narrow.rope.theta if sliding else None,
        "sliding.rope.factor": narrow.rope.factor,
        "sliding.rope.rotary_dims": narrow.rope.rotary_dims,
        "per_layer.dim": tables.dim if tables else 0,
        "per_layer.vocab_size": tables.vocab_size if tables else decoder.vocab_size,
        "experts.count": experts.count if experts else 0,
        "experts.top_k": experts.top_k if experts else 0,
        "experts.intermediate_size": experts.intermediate_size if experts else 0,
        "streams.count": streams.count if streams else 1,
        "streams.active": streams.active if streams else 0,
        "streams.rank": streams.rank if streams else 0,
        "sparsity": [layer.sparsity for layer in decoder.layers],
        **_embedder_facts(embedder),
    }


MEAN = 1  # llama_pooling_type


def _embedder_facts(embedder: Embedder | None) -> Flat:
    """Pooling and the sizes of the linears after it, which llama.cpp counts from 2; 0 where there are none."""
    dense = embedder.dense if embedder else ()
    sizes = [dense[index] if index < len(dense) else (0, 0) for index in range(len(DENSE))]
    return {
        "pooling": MEAN if embedder else 0,
        **{f"dense_{index}.out": out for index, (out, _) in enumerate(sizes, 2)},
        **{f"dense_{index}.in": inside for index, (_, inside) in enumerate(sizes, 2)},
    }


def kinds(decoder: Architecture) -> tuple[Layer | None, Layer | None]:
    """A sliding and a full layer to speak for all of their kind."""
    sliding = next((layer for layer in decoder.layers if layer.sliding), None)
    return sliding, next((layer for layer in decoder.layers if not layer.sliding), None)


def head_size(flat: Mapping[str, Any]) -> int:
    """What llama.cpp takes for the size of a head that a file does not say."""
    return max(1, int(flat["hidden_size"]) // int(flat["heads"]))


SLIDING_THETA = 10_000.0

# What every Gemma's file has (src/llama-model.cpp), in the order in which it is written.
COMMON = (
    Fact("max_positions", Form.COUNT, "{arch}.context_length"),
    Fact("hidden_size", Form.COUNT, "{arch}.embedding_length"),
    Fact("layers", Form.COUNT, "{arch}.block_count"),
    Fact("intermediate_size", Form.COUNTS, "{arch}.feed_forward_length"),
    Fact("heads", Form.COUNT, "{arch}.attention.head_count"),
    Fact("kv_heads", Form.COUNTS, "{arch}.attention.head_count_kv", lambda flat: [flat["heads"]] * flat["layers"]),
    Fact("rms_norm_eps", Form.POSITIVE, "{arch}.attention.layer_norm_rms_epsilon"),
    Fact("full.head_dim", Form.COUNT, "{arch}.attention.key_length", head_size),
    Fact("full.head_dim", Form.COUNT, "{arch}.attention.value_length", lambda flat: flat["full.head_dim"]),
)

# What config.json calls a flat fact that it says in one number; rope and heads are spelt by each family.
CONFIG = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "max_positions": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "final_softcap": "final_logit_softcapping",
    "attention_softcap": "attn_logit_softcapping",
    "tied": "tie_word_embeddings",
    "shared": "num_kv_shared_layers",
    "k_eq_v": "attention_k_eq_v",
    "per_layer.dim": "hidden_size_per_layer_input",
    "per_layer.vocab_size": "vocab_size_per_layer_input",
    "experts.count": "num_experts",
    "experts.top_k": "top_k_experts",
    "experts.intermediate_size": "moe_intermediate_size",
    "streams.count": "altup_num_inputs",
    "streams.active": "altup_active_idx",
    "streams.rank": "laurel_rank",
    "sparsity": "activation_sparsity_pattern",
}

# What ONNX Runtime GenAI's configuration calls one, under "model".
GENAI = {
    "vocab_size": "vocab_size",
    "hidden_size": "decoder.hidden_size",
    "heads": "decoder.num_attention_heads",
    "owners": "decoder.num_hidden_layers",  # layers with a cache of their own
}


def spelt(flat: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """These facts under the keys of config.json."""
    return {CONFIG[name]: flat[name] for name in names}


# What a verdict calls a fact of the decoder, or of a layer of it, that no row is named like.
_FOLLOWS = {"kv_source": ("shared", "the layer whose keys are read")}
_BY_TENSORS = {
    "rope.factor": "rope_freqs.weight: the RoPE factor",
    "rope.rotary_dims": "rope_freqs.weight: the dimensions that rotate",
    "tied": "no tensor output.weight: the head tied to the embedding",
}
_SPELT = {
    "rope.theta": "rope_theta of {type}",
    "rope.factor": "the RoPE factor of {type}",
    "rope.rotary_dims": "partial_rotary_factor of {type}: the dimensions that rotate",
    "sliding": "layer_types: sliding",
    "kv_heads": "num_key_value_heads",
    "attention_scale": "query_pre_attn_scalar: the attention scale",
}


def gguf_label(facts: Sequence[Fact], name: str, sliding: bool) -> str:
    """What a GGUF file calls the fact `name` of a decoder, or of a sliding or full layer of it; with {arch}."""
    name, says = _FOLLOWS.get(name, (name, ""))
    asked = (name, f"{'sliding' if sliding else 'full'}.{name}")
    key = next((fact.gguf for fact in facts if fact.name in asked), _BY_TENSORS.get(name, name))
    return f"{key}: {says}" if says else key


def config_label(name: str, sliding: bool) -> str:
    """What config.json calls it."""
    name, says = _FOLLOWS.get(name, (name, ""))
    key = _SPELT.get(name, CONFIG.get(name, name)).format(type=SLIDING if sliding else FULL)
    return f"{key}: {says}" if says else key
