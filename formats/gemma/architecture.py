"""What a Gemma decoder is made of, read from config.json once, in whichever spelling it came.

transformers 5.23 keeps what differs between layers in `per_layer_config`; older configs say `global_head_dim` and
`num_global_key_value_heads`. Both, and Gemma 3's own spellings of RoPE, become the same values here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemexport.formats.storage.errors import InputError

SUPPORTED = {"gemma3_text": "gemma3", "gemma4_text": "gemma4"}
WRAPPERS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text"}
Count = Field(gt=0, le=1 << 40)


class Rope(BaseModel):
    """Rotary position embedding of one layer (https://arxiv.org/abs/2104.09864), in the half-split layout."""

    model_config = ConfigDict(frozen=True)

    theta: float
    rotary_dims: int  # dimensions of a head that rotate; the rest pass through (proportional RoPE)
    factor: float = 1.0  # frequencies are divided by it (linear scaling)

    def inv_freq(self, head_dim: int) -> NDArray[np.float64]:
        """Radians a position for each pair of dimensions, `[head_dim // 2]`; zero where nothing rotates.

        The exponent's denominator is the whole head, also where only a part rotates: that is what makes it
        "proportional" (transformers' modeling_rope_utils).
        """
        frequencies = np.zeros(head_dim // 2)
        pairs = np.arange(0, self.rotary_dims, 2)
        frequencies[: len(pairs)] = 1.0 / self.theta ** (pairs / head_dim) / self.factor
        return frequencies


class Layer(BaseModel):
    """One decoder layer."""

    model_config = ConfigDict(frozen=True)

    index: int
    sliding: bool
    head_dim: int
    kv_heads: int
    intermediate_size: int
    rope: Rope
    kv_source: int  # its own index, or the layer whose keys and values it reads
    k_eq_v: bool = False  # no v_proj: the values are the unnormalised key projection

    @property
    def owns_cache(self) -> bool:
        """Whether this layer computes keys and values (else it reads a donor's)."""
        return self.kv_source == self.index


class PerLayerEmbeddings(BaseModel):
    """Gemma 4's per-layer embeddings: one table of `[vocab_size, layers * dim]`."""

    model_config = ConfigDict(frozen=True)

    dim: int
    vocab_size: int
    embed_scale: float
    projection_scale: float
    input_scale: float = 2.0**-0.5


class Architecture(BaseModel):
    """A Gemma text decoder."""

    model_config = ConfigDict(frozen=True)

    family: Literal["gemma3", "gemma4"]
    vocab_size: int
    hidden_size: int
    heads: int
    layers: tuple[Layer, ...]
    rms_norm_eps: float
    norm_offset: float  # a norm multiplies by offset + weight: 1 for Gemma 3, 0 for Gemma 4
    attention_scale: float
    sliding_window: int  # a query of a sliding layer sees itself and the window - 1 positions before
    final_softcap: float | None
    attention_softcap: float | None
    embed_scale: float
    tied: bool
    per_layer: PerLayerEmbeddings | None
    value_norm: bool  # values are RMS-normed, without a weight
    layer_scalar: bool  # each layer's output is multiplied by a scalar
    max_positions: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and shape of every tensor that the decoder needs, in the order of use."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        if self.per_layer:
            width = len(self.layers) * self.per_layer.dim
            shapes["model.embed_tokens_per_layer.weight"] = (self.per_layer.vocab_size, width)
            shapes["model.per_layer_model_projection.weight"] = (width, hidden)
            shapes["model.per_layer_projection_norm.weight"] = (self.per_layer.dim,)
        for layer in self.layers:
            names = self._layer_shapes(layer)
            shapes |= {f"model.layers.{layer.index}.{name}": shape for name, shape in names.items()}
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def _layer_shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        hidden, query, keys = self.hidden_size, self.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        wide = layer.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (query, hidden),
            "self_attn.q_norm.weight": (layer.head_dim,),
        }
        if layer.owns_cache:
            shapes["self_attn.k_proj.weight"] = (keys, hidden)
            shapes["self_attn.k_norm.weight"] = (layer.head_dim,)
            if not layer.k_eq_v:
                shapes["self_attn.v_proj.weight"] = (keys, hidden)
        shapes |= {
            "self_attn.o_proj.weight": (hidden, query),
            "post_attention_layernorm.weight": (hidden,),
            "pre_feedforward_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (wide, hidden),
            "mlp.up_proj.weight": (wide, hidden),
            "mlp.down_proj.weight": (hidden, wide),
            "post_feedforward_layernorm.weight": (hidden,),
        }
        if self.per_layer:
            shapes |= {
                "per_layer_input_gate.weight": (self.per_layer.dim, hidden),
                "per_layer_projection.weight": (hidden, self.per_layer.dim),
                "post_per_layer_input_norm.weight": (hidden,),
            }
        if self.layer_scalar:
            shapes["layer_scalar"] = (1,)
        return shapes

    def parameters(self) -> int:
        """How many weights the decoder has."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


class _TextConfig(BaseModel):
    """The fields of both families' text configs, with transformers' defaults where a config may leave them out."""

    model_config = ConfigDict(extra="allow")

    vocab_size: int | None = Field(default=None, gt=0)
    hidden_size: int = Count
    intermediate_size: int = Count
    num_hidden_layers: int = Field(gt=0, le=1 << 12)  # each becomes an object before any file is looked at
    num_attention_heads: int = Field(default=8, gt=0)
    num_key_value_heads: int = Field(default=4, gt=0)
    head_dim: int = Field(default=256, gt=0)
    hidden_activation: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 131_072
    sliding_window: int | None = None
    sliding_window_pattern: int | None = None
    older_pattern: int | None = Field(default=None, alias="_sliding_window_pattern")
    layer_types: list[Literal["sliding_attention", "full_attention"]] | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None
    query_pre_attn_scalar: float = Field(default=256, gt=0)
    # By attention type; transformers saves a config in the older spelling with settings of none of them beside these.
    rope_parameters: dict[str, Any] | None = None
    rope_theta: float | None = None
    rope_local_base_freq: float | None = None
    rope_scaling: dict[str, Any] | None = None
    global_head_dim: int | None = None
    num_global_key_value_heads: int | None = None
    per_layer_config: dict[int, dict[str, Any]] | None = None
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: int = Field(default=256, ge=0)
    vocab_size_per_layer_input: int = Field(default=262_144, gt=0)
    enable_moe_block: bool = False
    use_bidirectional_attention: bool | str | None = None
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = 0

    def types(self) -> list[str]:
        if self.layer_types is not None:
            return list(self.layer_types)
        pattern = self.sliding_window_pattern or self.older_pattern or 6
        return [
            "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(self.num_hidden_layers)
        ]


def text_config(config: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The decoder's own config: `config` itself, or the `text_config` of a multimodal one.

    Raises InputError for an architecture that is not a Gemma 3 or Gemma 4 decoder.
    """
    kind = str(config.get("model_type"))
    if kind in WRAPPERS and isinstance(config.get("text_config"), dict):
        inner = {"model_type": WRAPPERS[kind], **config["text_config"]}
        # The whole model's say decides in transformers; released configs name the end of a turn there.
        inner |= {key: config[key] for key in ("eos_token_id", "tie_word_embeddings") if config.get(key) is not None}
        return inner
    if kind in SUPPORTED:
        return config
    known = ", ".join(sorted([*SUPPORTED, *WRAPPERS]))
    raise InputError(path, f"the architecture {kind!r} is not known", f"use a checkpoint of one of these: {known}")


def architecture(config: dict[str, Any], path: str | Path) -> Architecture:
    """The decoder that `config` (a whole config.json, or a text config) describes.

    Raises InputError, naming `path`, for what is missing, contradictory or not supported.
    """
    raw = text_config(config, path)
    try:
        fields = _TextConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            path, f"{where}: {first['msg'].lower()}", "use the config.json that came with the model"
        ) from error
    family: Literal["gemma3", "gemma4"] = "gemma3" if raw["model_type"] == "gemma3_text" else "gemma4"
    _refuse(fields, family, path)
    try:
        layers = _layers(fields, family)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise InputError(
            path, f"the layers are contradictory ({error})", "use the config.json that came with the model"
        ) from error
    eos = fields.eos_token_id
    per_layer = None
    if family == "gemma4" and fields.hidden_size_per_layer_input:
        dim = fields.hidden_size_per_layer_input
        per_layer = PerLayerEmbeddings(
            dim=dim,
            vocab_size=fields.vocab_size_per_layer_input,
            embed_scale=dim**0.5,
            projection_scale=fields.hidden_size**-0.5,
        )
    return Architecture(
        family=family,
        vocab_size=fields.vocab_size or (262_208 if family == "gemma3" else 262_144),
        hidden_size=fields.hidden_size,
        heads=fields.num_attention_heads,
        layers=layers,
        rms_norm_eps=fields.rms_norm_eps,
        norm_offset=1.0 if family == "gemma3" else 0.0,
        attention_scale=fields.query_pre_attn_scalar**-0.5 if family == "gemma3" else 1.0,
        sliding_window=fields.sliding_window or (4096 if family == "gemma3" else 512),
        final_softcap=fields.final_logit_softcapping,
        attention_softcap=fields.attn_logit_softcapping if family == "gemma3" else None,
        embed_scale=fields.hidden_size**0.5,
        tied=fields.tie_word_embeddings,
        per_layer=per_layer,
        value_norm=family == "gemma4",
        layer_scalar=family == "gemma4",
        max_positions=fields.max_position_embeddings,
        bos_token_id=fields.bos_token_id,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_token_id=fields.pad_token_id,
    )


def _refuse(fields: _TextConfig, family: str, path: str | Path) -> None:
    """Raise InputError for what a config may ask and the decoder here does not do."""
    types = fields.types()
    problems = {
        "it has experts (enable_moe_block)": fields.enable_moe_block,
        "attention is bidirectional": fields.use_bidirectional_attention in (True, "all"),
        "attention has biases": fields.attention_bias,
        f"the activation is {fields.hidden_activation}": fields.hidden_activation != "gelu_pytorch_tanh",
        f"layer_types names {len(types)} layers of {fields.num_hidden_layers}": len(types) != fields.num_hidden_layers,
        "heads are not a multiple of key/value heads": fields.num_attention_heads % fields.num_key_value_heads != 0,
        "every layer would share keys and values": fields.num_kv_shared_layers >= fields.num_hidden_layers,
        "the last layer is a sliding one": family == "gemma4" and types[-1:] == ["sliding_attention"],
    }
    for problem, present in problems.items():
        if present:
            raise InputError(path, f"{problem}, which is not supported", "use a dense Gemma 3 or Gemma 4 text decoder")


def _layers(fields: _TextConfig, family: str) -> tuple[Layer, ...]:
    types = fields.types()
    first_shared = fields.num_hidden_layers - (fields.num_kv_shared_layers if family == "gemma4" else 0)
    layers = []
    for index, kind in enumerate(types):
        sliding = kind == "sliding_attention"
        head_dim, kv_heads = _heads(fields, family, index, sliding)
        shared = index >= first_shared
        # A shared layer reads the last layer of its own attention type that computes keys and values.
        donors = [i for i in range(first_shared) if types[i] == kind]
        if shared and not donors:
            raise ValueError(f"layer {index} shares the keys of a {kind} layer, and there is none")
        layers.append(
            Layer(
                index=index,
                sliding=sliding,
                head_dim=head_dim,
                kv_heads=kv_heads,
                intermediate_size=fields.intermediate_size * (2 if shared and fields.use_double_wide_mlp else 1),
                rope=_rope(fields, family, kind, head_dim),
                kv_source=donors[-1] if shared else index,
                k_eq_v=family == "gemma4" and fields.attention_k_eq_v and not sliding,
            )
        )
    return tuple(layers)


def _heads(fields: _TextConfig, family: str, index: int, sliding: bool) -> tuple[int, int]:
    """Head size and key/value heads of a layer."""
    if family == "gemma3":
        return fields.head_dim, fields.num_key_value_heads
    if fields.per_layer_config is not None:
        own = fields.per_layer_config.get(index, {})
        return int(own.get("head_dim", fields.head_dim)), int(
            own.get("num_key_value_heads", fields.num_key_value_heads)
        )
    if sliding:
        return fields.head_dim, fields.num_key_value_heads
    kv_heads = fields.num_global_key_value_heads if fields.attention_k_eq_v else None
    return fields.global_head_dim or 512, kv_heads or fields.num_key_value_heads


def _rope(fields: _TextConfig, family: str, kind: str, head_dim: int) -> Rope:
    """RoPE of a layer of this attention type; both generations' spellings and transformers' defaults."""
    sliding = kind == "sliding_attention"
    given = dict((fields.rope_parameters or {}).get(kind) or {})
    if family == "gemma3":
        if not sliding and fields.rope_scaling:
            given |= fields.rope_scaling
        flat = fields.rope_local_base_freq if sliding else fields.rope_theta
        given.setdefault("rope_theta", flat or (10_000.0 if sliding else 1_000_000.0))
    elif not given:
        given = (
            {"rope_theta": 10_000.0}
            if sliding
            else {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1_000_000.0,
            }
        )
    rope_type = given.get("rope_type", given.get("type", "default"))
    if rope_type not in ("default", "linear", "proportional"):
        raise ValueError(f"rope_type {rope_type} is not supported")
    part = float(given.get("partial_rotary_factor", 1.0)) if rope_type == "proportional" else 1.0
    factor = 1.0 if rope_type == "default" else float(given.get("factor", 1.0))
    return Rope(theta=float(given["rope_theta"]), rotary_dims=2 * int(part * head_dim // 2), factor=factor)
