"""The config.json of a demo model of each family: small, and with every feature of the released ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gemexport.demo import tokenizer as demo_tokenizer
from gemexport.formats.gemma.embedder import MODULES
from gemexport.formats.gemma.families import named
from gemexport.formats.gemma.families.embeddinggemma import EmbeddingGemma
from gemexport.formats.gemma.families.family import Family
from gemexport.formats.gemma.families.gemma1 import Gemma1
from gemexport.formats.gemma.families.gemma2 import Gemma2
from gemexport.formats.gemma.families.gemma3 import Gemma3
from gemexport.formats.gemma.families.gemma3n import Gemma3n
from gemexport.formats.gemma.families.gemma4 import Gemma4
from gemexport.formats.gemma.families.gemma4_unified import Gemma4Unified
from gemexport.formats.gemma.families.shieldgemma2 import ShieldGemma2
from gemexport.formats.gemma.families.vaultgemma import VaultGemma
from gemexport.formats.gemma.fields import FULL, SLIDING


class Size(NamedTuple):
    """The dimensions of a demo model; full-attention layers of Gemma 4 have heads twice as wide."""

    vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    per_layer: int
    window: int


SIZES = {
    "demo": Size(2048, 256, 512, 4, 2, 64, 64, 32),
    "tiny": Size(512, 64, 96, 2, 1, 32, 32, 8),
}
# Two layers of each type compute keys and values, one of them is the donor, and both types are shared. llama.cpp takes
# the last two layers before the shared ones for the donors, sliding first, as in the released sizes.
GEMMA4_LAYERS = [SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING, FULL]
GEMMA4_SHARED = 3
GEMMA2_LAYERS = [SLIDING, FULL, SLIDING, FULL]
# As llama.cpp's graph of a Gemma 3n asks: 20 layers with keys and values, of which each fifth sees everything.
GEMMA3N_LAYERS, GEMMA3N_SHARED = [*[SLIDING] * 4, FULL] * 5, 5
GEMMA3_LAYERS = [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]
EXPERTS_LAYERS = [SLIDING, FULL, SLIDING, FULL]
EXPERTS, CHOSEN = 8, 2
WIDE = 4  # times an MLP's width: what is far above the mean of few is of no known number
GLOBAL_HEAD_DIM, PER_LAYER_CONFIG = "global_head_dim", "per_layer_config"  # spellings


def config_json(family: str, size: Size, spelling: str = GLOBAL_HEAD_DIM, experts: bool = False) -> dict[str, Any]:
    """The config.json of a demo model; `spelling` is how Gemma 4 says that heads differ between layers.

    "global_head_dim" is what released checkpoints say, "per_layer_config" what transformers 5.23 writes. With `experts`
    a Gemma 4 is like 26B-A4B, else like E2B.
    """
    known = named(family)
    names = {"architectures": [known.reference_class], "model_type": known.text_type or known.reference_type}
    return _common(size) | CONFIGS[type(known)](names, size, spelling, experts)


def wrapped(config: dict[str, Any], family: Family[Any]) -> dict[str, Any]:
    """The config of a multimodal model whose decoder is that of `config`."""
    text = {key: value for key, value in config.items() if key != "architectures"}
    return {
        "architectures": [family.whole_class],
        "dtype": "bfloat16",
        "eos_token_id": config["eos_token_id"],
        "model_type": family.whole_type,
        "text_config": text,
        "tie_word_embeddings": True,
    }


def _common(size: Size) -> dict[str, Any]:
    return {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "pad_token_id": 0, "dtype": "bfloat16",
        "head_dim": size.head_dim, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": size.hidden,
        "initializer_range": 0.02, "intermediate_size": size.intermediate, "max_position_embeddings": 4096,
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "rms_norm_eps": 1e-6,
        "sliding_window": size.window, "tie_word_embeddings": True, "use_cache": True, "vocab_size": size.vocab,
    }  # fmt: skip


def _gemma3(names: dict[str, Any], size: Size, _: str, __: bool) -> dict[str, Any]:
    return names | {
        "eos_token_id": 1, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "layer_types": GEMMA3_LAYERS, "num_hidden_layers": len(GEMMA3_LAYERS), "query_pre_attn_scalar": size.head_dim,
        "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0,
    }  # fmt: skip


def _gemma4(names: dict[str, Any], size: Size, spelling: str, experts: bool) -> dict[str, Any]:
    layers = EXPERTS_LAYERS if experts else GEMMA4_LAYERS
    if spelling == PER_LAYER_CONFIG:
        full = [i for i, kind in enumerate(layers) if kind == FULL]
        heads: dict[str, Any] = {"per_layer_config": {str(i): {"head_dim": 2 * size.head_dim} for i in full}}
    else:
        heads = {"global_head_dim": 2 * size.head_dim, "num_global_key_value_heads": None}
    wording = Gemma4.wording
    turn_end = demo_tokenizer.vocabulary(size.vocab, wording).index(wording.turn[1])
    return heads | names | {
        "eos_token_id": [1, turn_end],
        "attention_k_eq_v": False, "enable_moe_block": False, "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": size.per_layer, "layer_types": GEMMA4_LAYERS,
        "num_hidden_layers": len(GEMMA4_LAYERS), "num_kv_shared_layers": GEMMA4_SHARED, "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": size.vocab,
        "rope_parameters": {
            FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
        },
    } | (_experts(size) if experts else {})  # fmt: skip


def _experts(size: Size) -> dict[str, Any]:
    """What 26B-A4B's config says otherwise than E2B's."""
    return {
        "attention_k_eq_v": True, "enable_moe_block": True, "hidden_size_per_layer_input": 0,
        "layer_types": EXPERTS_LAYERS, "moe_intermediate_size": size.hidden, "num_experts": EXPERTS,
        "num_hidden_layers": len(EXPERTS_LAYERS), "num_kv_shared_layers": 0, "top_k_experts": CHOSEN,
        "use_double_wide_mlp": False,
    }  # fmt: skip


def _gemma4_unified(names: dict[str, Any], size: Size, spelling: str, _: bool) -> dict[str, Any]:
    """As 12B: full layers with one head of keys that are the values too, and nothing besides."""
    kept = ("attention_k_eq_v", "layer_types", "num_hidden_layers", "num_kv_shared_layers", "use_double_wide_mlp")
    like = {key: value for key, value in _experts(size).items() if key in kept}
    lacks = ("enable_moe_block", "hidden_size_per_layer_input", "vocab_size_per_layer_input")
    own = {"num_global_key_value_heads": 1, "use_bidirectional_attention": "vision"}
    config = _gemma4(names, size, spelling, False) | like | own
    return {key: value for key, value in config.items() if key not in lacks}


def _gemma3n(names: dict[str, Any], size: Size, _: str, __: bool) -> dict[str, Any]:
    layers = len(GEMMA3N_LAYERS)
    return names | {
        "eos_token_id": 1, "activation_sparsity_pattern": [0.95] * 10 + [0.0] * (layers - 10),
        "altup_active_idx": 0, "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_num_inputs": 4,
        "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 256,
        "intermediate_size": [WIDE * size.intermediate] * layers, "laurel_rank": 64, "layer_types": GEMMA3N_LAYERS,
        "num_hidden_layers": layers, "num_kv_shared_layers": GEMMA3N_SHARED, "rope_local_base_freq": 10000.0,
        "rope_scaling": None, "rope_theta": 1000000.0, "vocab_size_per_layer_input": size.vocab - 64,
    }  # fmt: skip


def _gemma2(names: dict[str, Any], size: Size, _: str, __: bool) -> dict[str, Any]:
    return names | {
        "eos_token_id": 1, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0,
        "layer_types": GEMMA2_LAYERS, "num_hidden_layers": len(GEMMA2_LAYERS), "query_pre_attn_scalar": size.head_dim,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }  # fmt: skip


def _gemma1(names: dict[str, Any], size: Size, _: str, __: bool) -> dict[str, Any]:
    return names | {
        "eos_token_id": 1, "hidden_act": "gelu", "num_hidden_layers": len(GEMMA2_LAYERS), "rope_theta": 10000.0,
    }  # fmt: skip


def _embeddinggemma(names: dict[str, Any], size: Size, spelling: str, experts: bool) -> dict[str, Any]:
    wide = 4 * size.hidden
    modules = {"pooling": "mean", "dense": [[wide, size.hidden], [size.hidden, wide]], "normalize": True}
    return _gemma3(names, size, spelling, experts) | {"use_bidirectional_attention": True, MODULES: modules}


Maker = Callable[[dict[str, Any], Size, str, bool], dict[str, Any]]
CONFIGS: dict[type[Family[Any]], Maker] = {
    EmbeddingGemma: _embeddinggemma,
    Gemma1: _gemma1,
    Gemma2: _gemma2,
    Gemma3: _gemma3,
    Gemma3n: _gemma3n,
    Gemma4: _gemma4,
    Gemma4Unified: _gemma4_unified,
    ShieldGemma2: _gemma3,
    VaultGemma: _gemma2,
}
