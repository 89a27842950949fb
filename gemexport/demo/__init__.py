"""Makes a small random checkpoint that has every feature of the real ones, so that a whole run takes a minute.

The weights come from integers of a PCG64 stream and IEEE arithmetic alone, so one seed gives the same bytes on every
machine. They are scaled so that the model behaves like a trained one where it matters to a test: its most likely next
token wins by a clear margin, depends on the context, and changes when any part of the model is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gemexport.demo import configs, modules, qat
from gemexport.demo import tokenizer as demo_tokenizer
from gemexport.demo.configs import GLOBAL_HEAD_DIM, SIZES, Size, config_json
from gemexport.formats.checkpoint import Checkpoint, Unpacked
from gemexport.formats.gemma.architecture import Architecture, TensorSpec
from gemexport.formats.gemma.embedder import MODULES
from gemexport.formats.gemma.families import named
from gemexport.formats.gemma.model import Model, describe, text_config
from gemexport.formats.gemma.roles import Kind, Role
from gemexport.formats.storage.files import atomic
from gemexport.formats.storage.safetensors import DTYPE_NAMES, NUMPY_DTYPES, Entry, ShardedWriter
from gemexport.formats.tensor import ArrayTensor, DType, Floats, Grid, Tensor, to_bf16

__all__ = [
    "SIZES",
    "FamilyName",
    "Size",
    "config_json",
    "in_memory",
    "make",
    "random_values",
    "write",
    "write_generation_config",
]

FamilyName = Literal["gemma3", "gemma4", "gemma4_unified", "gemma3n", "gemma2", "gemma", "vaultgemma", "embeddinggemma"]
TOWER = "model.vision_tower.patch_embedder.input_proj.weight"


# Chosen by measurement, see `make`: how far logits spread, how peaked attention is, how much a layer adds.
LOGIT_SPREAD = 6.0
ATTENTION_SPREAD = 1.0
LAYER_SHARE, LAYER_SHARE_OF_SCALED = 6.0, 1.0  # where no layer scalar lets the embedding fade, and where one does
LAYER_SCALARS = (0.5, 0.9)
ROUTER_SPREAD = 2.0  # of the scores by which experts are chosen
# Of several streams: what mixes them, how far it does, and how much a layer adds, where each reads its own norm's size.
STREAMS_SPREAD, STREAMS_MIXED, STREAMS_SHARE = 0.5, 0.2, 0.3
# Norms of what is added to the residual.
ADDED = {
    Role.POST_ATTENTION_NORM,
    Role.POST_MLP_NORM,
    Role.POST_DENSE_NORM,
    Role.POST_EXPERTS_NORM,
    Role.POST_PER_LAYER_NORM,
    Role.RESIDUAL_NORM,
}
QUIET = 0.25
LOUDNESS = 0.2


def _bell(stream: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Numbers of mean zero and variance one, nearly normal: sums of four integers, so exact on every machine."""
    total = sum(stream.integers(-32768, 32768, size=shape, dtype=np.int32) for _ in range(4))
    return (np.asarray(total, dtype=np.float32) + np.float32(2)) / np.float32(2 * 65536 / 12**0.5)


def random_values(spec: TensorSpec, model: Architecture, quiet: list[int], stream: np.random.Generator) -> Floats:
    """The weights of one tensor before they are put on a grid."""
    role, shape = spec.role, spec.shape
    if role is Role.LAYER_SCALAR:
        low, high = LAYER_SCALARS
        share = np.float32(stream.integers(0, 1024)) / np.float32(1024)
        return np.full(shape, low, np.float32) + share * np.float32(high - low)
    if not role.has_rows:
        spread = np.float32(1) + np.float32(0.15) * _bell(stream, shape)
        return spread * np.float32(_size(role, shape[0], model)) - np.float32(model.norm_offset)
    weights = _bell(stream, shape) / np.float32((model.per_layer.dim if model.per_layer else 1) ** 0.5)
    if role is not Role.PER_LAYER_EMBEDDING:
        weights = _bell(stream, shape) / np.float32(shape[-1] ** 0.5)
    if role is Role.ROUTER:
        weights *= np.float32(ROUTER_SPREAD * shape[-1] ** 0.5)  # what it reads has the norm 1
    if role is Role.STREAMS_ROUTER:
        weights *= np.float32(STREAMS_SPREAD * shape[-1])  # what it reads is divided by its width
    if role in (Role.STREAMS_PREDICTION, Role.STREAMS_CORRECTION):
        weights *= np.float32(STREAMS_MIXED)
    if role is Role.EMBEDDING:
        # Rows of unlike length, as in trained models: the longer ones win by more.
        weights *= np.float32(1) + np.float32(LOUDNESS) * _bell(stream, (shape[0], 1))
        weights[quiet] *= np.float32(QUIET)
    return weights


def _size(role: Role, width: int, model: Architecture) -> float:
    """What a norm or a factor multiplies by, on average."""
    if role is Role.K_NORM:
        # Queries and keys of norm sqrt(width): their products spread by sqrt(width) times the attention scale.
        return ATTENTION_SPREAD / float(width**0.5 * model.attention_scale)
    if role is Role.FINAL_NORM:
        return LOGIT_SPREAD
    if role in ADDED and role is not model.mlp_norm:
        return STREAMS_SHARE if model.streams else LAYER_SHARE_OF_SCALED if model.layer_scalar else LAYER_SHARE
    return 1.0


def _stored(values: Floats, role: Role, rule: str | None, dtype: DType) -> NDArray[Any]:
    if rule is None or not role.has_rows or role.kind in (Kind.ROUTER, Kind.MIXER):  # as in released checkpoints
        bits = to_bf16(values)
    else:
        bits = qat.on_grid(values.reshape(-1, values.shape[-1]), rule).reshape(values.shape)
    if dtype == "bf16":
        return bits
    wide = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide.astype(NUMPY_DTYPES[DTYPE_NAMES[dtype]])


def make(
    folder: Path,
    *,
    family: FamilyName = "gemma4",
    size: Size | str = "demo",
    seed: int = 0,
    rule: str | None = "max/7",
    dtype: DType = "bf16",
    spelling: str = GLOBAL_HEAD_DIM,
    wrapped: bool = False,
    experts: bool = False,
    plain: Collection[Role] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a demo checkpoint (config, weights, tokenizer) as a Hugging Face folder; returns `folder`.

    `rule` is how the scales of the int4 grid follow from the weights (`gemexport.demo.qat.RULES`), or None for plain
    weights. The default leaves every block without a code of -8, which is what converters stumble over. `wrapped`
    writes the decoder as it lies in a multimodal checkpoint, beside a tensor of a vision tower. With `experts`
    there are some beside every layer's MLP. Tensors of the roles `plain` are on no grid, whatever the rule.
    """
    config = config_json(family, SIZES[size] if isinstance(size, str) else size, spelling, experts)
    prefix = "model.language_model." if wrapped else "model."
    whole = configs.wrapped(config, named(family)) if wrapped else config
    extra = [Entry(TOWER, DTYPE_NAMES[dtype], (64, 48))] if wrapped else []
    settings: dict[str, Any] = {"prefix": prefix, "extra": extra, "plain": plain, "max_shard_bytes": max_shard_bytes}
    return write(folder, whole, seed, rule, dtype, **settings)


def write(
    folder: Path,
    config: dict[str, Any],
    seed: int = 0,
    rule: str | None = "max/7",
    dtype: DType = "bf16",
    *,
    prefix: str = "model.",
    extra: Sequence[Entry] = (),
    plain: Collection[Role] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a random checkpoint of the model that `config` describes, of whatever family; returns `folder`.

    Tensors have the names of the family's own checkpoints; `prefix` stands for the "model." of canonical ones. Those
    of `extra`, which the decoder does not have, are zeros; those of the roles `plain` are on no grid.
    """
    model = describe(config, folder)
    decoder = {spec.name: spec for spec in model.decoder.specs()}
    names = {name: _in_files(model, spec, prefix) for name, spec in decoder.items()}
    entries = [Entry(names[name], DTYPE_NAMES[dtype], spec.shape) for name, spec in decoder.items()]

    def made(spec: TensorSpec) -> NDArray[Any]:
        # A stream for each name: a model with other layers still has the same weights in those it shares.
        stream = np.random.Generator(np.random.PCG64([seed, *spec.name.encode()]))
        values = random_values(spec, model.decoder, quiet, stream)
        return _stored(values, spec.role, None if spec.role in plain else rule, dtype)

    with atomic(folder) as partial:
        partial.mkdir()
        tokens = demo_tokenizer.write(partial, model.decoder.vocab_size, model.family.wording)
        quiet = demo_tokenizer.silent_ids(tokens)
        with ShardedWriter(partial, [*entries, *extra], max_shard_bytes=max_shard_bytes) as writer:
            for name, spec in decoder.items():
                writer.write(names[name], made(spec))
            for entry in extra:
                writer.write(entry.name, np.zeros(entry.shape, NUMPY_DTYPES[entry.dtype]))
        _write_json(partial / "config.json", {key: value for key, value in config.items() if key != MODULES})
        if model.embedder is not None:
            modules.write(partial, model.embedder, DTYPE_NAMES[dtype], made)
        write_generation_config(partial, text_config(config, folder))
    return folder


def _in_files(model: Model, spec: TensorSpec, prefix: str) -> str:
    """A tensor's name in a checkpoint of its family."""
    return prefix + model.family.names.name(spec.role, spec.layer).removeprefix("model.")


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
        values = random_values(spec, model.decoder, [], stream).astype(np.float32)
        tensors[name] = ArrayTensor(name, values) if not spec.role.has_rows else _in_rows(name, values, bits)
    return Checkpoint("random", Path("nowhere"), config, config, model, tensors, lambda: Unpacked(Path("nowhere")))


def _in_rows(name: str, values: Floats, bits: int) -> Tensor:
    """A matrix on a grid of one scale a row, as mobile checkpoints have it."""
    most = (1 << (bits - 1)) - 1
    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(most)
    codes = np.rint(values / scales).astype(np.int8)
    return ArrayTensor(name, codes * scales, "f32", codes, scales, Grid(bits, values.shape[1], "f32", lossless=True))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
