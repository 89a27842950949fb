"""Makes a small random checkpoint that has every feature of the real ones, so that a whole run takes a minute.

The weights come from integers of a PCG64 stream and IEEE arithmetic alone, so one seed gives the same bytes on every
machine. They are scaled so that the model behaves like a trained one where it matters to a test: its most likely next
token wins by a clear margin, depends on the context, and changes when any part of the model is wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemexport.demo import qat
from gemexport.demo import tokenizer as demo_tokenizer
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.architecture import Architecture
from gemexport.formats.gemma.model import architecture, describe
from gemexport.formats.gemma.names import role_of
from gemexport.formats.gemma.roles import Role
from gemexport.formats.storage.files import atomic
from gemexport.formats.storage.safetensors import DTYPE_NAMES, NUMPY_DTYPES, Entry, ShardedWriter
from gemexport.formats.tensor import ArrayTensor, DType, Floats, Grid, Tensor, to_bf16

Family = Literal["gemma3", "gemma4"]


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
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA4_LAYERS = [SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING, FULL]
GEMMA4_SHARED = 3
GEMMA3_LAYERS = [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]
EXPERTS_LAYERS = [SLIDING, FULL, SLIDING, FULL]
EXPERTS, CHOSEN = 8, 2

# Chosen by measurement, see `make`: how far logits spread, how peaked attention is, how much a layer adds.
LOGIT_SPREAD = 6.0
ATTENTION_SPREAD = 1.0
LAYER_SHARE, LAYER_SHARE_OF_SCALED = 6.0, 1.0  # where no layer scalar lets the embedding fade, and where one does
LAYER_SCALARS = (0.5, 0.9)
ROUTER_SPREAD = 2.0  # of the scores by which experts are chosen
QUIET = 0.25
LOUDNESS = 0.2


def config_json(family: Family, size: Size, spelling: str = "global_head_dim", experts: bool = False) -> dict[str, Any]:
    """The config.json of a demo model; `spelling` is how Gemma 4 says that heads differ between layers.

    "global_head_dim" is what released checkpoints say, "per_layer_config" what transformers 5.23 writes. With `experts`
    a Gemma 4 is like 26B-A4B, else like E2B.
    """
    common: dict[str, Any] = {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "pad_token_id": 0, "dtype": "bfloat16",
        "head_dim": size.head_dim, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": size.hidden,
        "initializer_range": 0.02, "intermediate_size": size.intermediate, "max_position_embeddings": 4096,
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "rms_norm_eps": 1e-6,
        "sliding_window": size.window, "tie_word_embeddings": True, "use_cache": True, "vocab_size": size.vocab,
    }  # fmt: skip
    if family == "gemma3":
        return common | {
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "eos_token_id": 1,
            "attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": GEMMA3_LAYERS,
            "num_hidden_layers": len(GEMMA3_LAYERS), "query_pre_attn_scalar": size.head_dim,
            "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0,
        }  # fmt: skip
    layers = EXPERTS_LAYERS if experts else GEMMA4_LAYERS
    if spelling == "per_layer_config":
        full = [i for i, kind in enumerate(layers) if kind == FULL]
        heads: dict[str, Any] = {"per_layer_config": {str(i): {"head_dim": 2 * size.head_dim} for i in full}}
    else:
        heads = {"global_head_dim": 2 * size.head_dim, "num_global_key_value_heads": None}
    turn_end = demo_tokenizer.vocabulary(size.vocab, family).index(demo_tokenizer.TURNS[family][1])
    own = _experts(size) if experts else {}
    return common | heads | {
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "eos_token_id": [1, turn_end],
        "attention_k_eq_v": False, "enable_moe_block": False, "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": size.per_layer, "layer_types": GEMMA4_LAYERS,
        "num_hidden_layers": len(GEMMA4_LAYERS), "num_kv_shared_layers": GEMMA4_SHARED, "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": size.vocab,
        "rope_parameters": {
            FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
        },
    } | own  # fmt: skip


def _experts(size: Size) -> dict[str, Any]:
    """What 26B-A4B's config says otherwise than E2B's."""
    return {
        "attention_k_eq_v": True, "enable_moe_block": True, "hidden_size_per_layer_input": 0,
        "layer_types": EXPERTS_LAYERS, "moe_intermediate_size": size.hidden, "num_experts": EXPERTS,
        "num_hidden_layers": len(EXPERTS_LAYERS), "num_kv_shared_layers": 0, "top_k_experts": CHOSEN,
        "use_double_wide_mlp": False,
    }  # fmt: skip


def _bell(stream: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Numbers of mean zero and variance one, nearly normal: sums of four integers, so exact on every machine."""
    total = sum(stream.integers(-32768, 32768, size=shape, dtype=np.int32) for _ in range(4))
    return (np.asarray(total, dtype=np.float32) + np.float32(2)) / np.float32(2 * 65536 / 12**0.5)


def random_values(
    name: str, shape: tuple[int, ...], model: Architecture, quiet: list[int], stream: np.random.Generator
) -> Floats:
    """The weights of one tensor before they are put on a grid."""
    if name.endswith("layer_scalar"):
        low, high = LAYER_SCALARS
        share = np.float32(stream.integers(0, 1024)) / np.float32(1024)
        return np.full(shape, low, np.float32) + share * np.float32(high - low)
    if len(shape) == 1:
        spread = np.float32(1) + np.float32(0.15) * _bell(stream, shape)
        return spread * np.float32(_norm_size(name, shape[0], model)) - np.float32(model.norm_offset)
    weights = _bell(stream, shape) / np.float32((model.per_layer.dim if model.per_layer else 1) ** 0.5)
    if "embed_tokens_per_layer" not in name:
        weights = _bell(stream, shape) / np.float32(shape[-1] ** 0.5)
    if role_of(name) is Role.ROUTER:
        weights *= np.float32(ROUTER_SPREAD * shape[-1] ** 0.5)  # what it reads has the norm 1
    if name == "model.embed_tokens.weight":
        # Rows of unlike length, as in trained models: the longer ones win by more.
        weights *= np.float32(1) + np.float32(LOUDNESS) * _bell(stream, (shape[0], 1))
        weights[quiet] *= np.float32(QUIET)
    return weights


def _norm_size(name: str, width: int, model: Architecture) -> float:
    """What a norm multiplies by, on average."""
    if name.endswith("k_norm.weight"):
        # Queries and keys of norm sqrt(width): their products spread by sqrt(width) times the attention scale.
        return ATTENTION_SPREAD / float(width**0.5 * model.attention_scale)
    if name == "model.norm.weight":
        return LOGIT_SPREAD
    if "post_" in name:
        return LAYER_SHARE_OF_SCALED if model.layer_scalar else LAYER_SHARE
    return 1.0


def _stored(values: Floats, name: str, rule: str | None, dtype: DType) -> NDArray[Any]:
    matrices = values.reshape(-1, values.shape[-1])
    off = values.ndim < 2 or role_of(name) is Role.ROUTER  # as in released checkpoints
    bits = to_bf16(values) if rule is None or off else qat.on_grid(matrices, rule).reshape(values.shape)
    if dtype == "bf16":
        return bits
    wide = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide.astype(NUMPY_DTYPES[DTYPE_NAMES[dtype]])


def make(
    folder: Path,
    *,
    family: Family = "gemma4",
    size: Size | str = "demo",
    seed: int = 0,
    rule: str | None = "max/7",
    dtype: DType = "bf16",
    spelling: str = "global_head_dim",
    wrapped: bool = False,
    experts: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a demo checkpoint (config, weights, tokenizer) as a Hugging Face folder; returns `folder`.

    `rule` is how the scales of the int4 grid follow from the weights (`gemexport.demo.qat.RULES`), or None for plain
    weights. The default leaves every block without a code of -8, which is what converters stumble over. `wrapped`
    writes the decoder as it lies in a multimodal checkpoint, beside a tensor of a vision tower. With `experts`
    there are some beside every layer's MLP.
    """
    dimensions = SIZES[size] if isinstance(size, str) else size
    config = config_json(family, dimensions, spelling, experts)
    model = architecture(config, folder)
    prefix = "model.language_model." if wrapped else "model."
    shapes = model.tensor_shapes()
    names = {name: prefix + name.removeprefix("model.") for name in shapes}
    entries = [Entry(names[name], DTYPE_NAMES[dtype], shape) for name, shape in shapes.items()]
    tower = Entry("model.vision_tower.patch_embedder.input_proj.weight", DTYPE_NAMES[dtype], (64, 48))
    with atomic(folder) as partial:
        partial.mkdir()
        tokens = demo_tokenizer.write(partial, dimensions.vocab, family)
        quiet = demo_tokenizer.silent_ids(tokens)
        with ShardedWriter(
            partial, [*entries, tower] if wrapped else entries, max_shard_bytes=max_shard_bytes
        ) as writer:
            for name, shape in shapes.items():
                # A stream for each name: a model with other layers still has the same weights in those it shares.
                stream = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
                writer.write(names[name], _stored(random_values(name, shape, model, quiet, stream), name, rule, dtype))
            if wrapped:
                writer.write(tower.name, np.zeros(tower.shape, NUMPY_DTYPES[tower.dtype]))
        _write_json(partial / "config.json", _wrapped_config(config, family) if wrapped else config)
        write_generation_config(partial, config)
    return folder


def write_generation_config(folder: Path, config: dict[str, Any]) -> None:
    """generation_config.json with Gemma's settings and the special tokens of the text config `config`."""
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {"do_sample": True, **tokens, "top_k": 64, "top_p": 0.95})


def in_memory(config: dict[str, Any], bits: int) -> Checkpoint:
    """A random decoder of `config` that is nowhere on disk: matrices of `bits`-bit codes with one scale a row."""
    model = describe(config, "a random decoder")
    tensors: dict[str, Tensor] = {}
    for name, spec in model.specs.items():
        stream = np.random.Generator(np.random.PCG64([0, *name.encode()]))
        values = random_values(name, spec.shape, model.decoder, [], stream).astype(np.float32)
        tensors[name] = ArrayTensor(name, values) if not spec.role.has_rows else _in_rows(name, values, bits)
    return Checkpoint("random", Path("nowhere"), config, config, model, tensors, lambda: Path("nowhere"))


def _in_rows(name: str, values: Floats, bits: int) -> Tensor:
    """A matrix on a grid of one scale a row, as mobile checkpoints have it."""
    most = (1 << (bits - 1)) - 1
    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(most)
    codes = np.rint(values / scales).astype(np.int8)
    return ArrayTensor(name, codes * scales, "f32", codes, scales, Grid(bits, values.shape[1], "f32", lossless=True))


def _wrapped_config(config: dict[str, Any], family: Family) -> dict[str, Any]:
    number = family.removeprefix("gemma")
    text = {key: value for key, value in config.items() if key != "architectures"}
    return {
        "architectures": [f"Gemma{number}ForConditionalGeneration"],
        "dtype": "bfloat16",
        "eos_token_id": config["eos_token_id"],
        "model_type": family,
        "text_config": text,
        "tie_word_embeddings": True,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
