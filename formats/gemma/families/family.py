"""What a family of Gemma models says of itself: all that differs between one and another is here."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, Field, ValidationError

from gemexport.formats.gemma.architecture import Architecture, Experts, Layer, PerLayerEmbeddings, Rope, Streams
from gemexport.formats.gemma.embedder import Embedder
from gemexport.formats.gemma.facts import COMMON, Fact, Flat, spelt
from gemexport.formats.gemma.fields import FULL, SLIDING, Positive, TextFields, kind_of
from gemexport.formats.gemma.names import CANONICAL, Dialect, canonical_name
from gemexport.formats.gemma.roles import Role
from gemexport.formats.storage.errors import InputError

F = TypeVar("F", bound=TextFields)

ROPES = ("default", "linear", "proportional")
MENDED = "use the config.json that came with the model"


@dataclass(frozen=True)
class Wording:
    """The tokens of a family's tokenizer that are no text."""

    turn: tuple[str, str]  # begin and end of a turn
    eos: str  # what its tokenizer_config.json calls the end
    markup: tuple[str, ...] = ()  # of reasoning and tools: some runtimes must show it, so these are not control tokens
    adds_runs: bool = False  # runs of newlines and of spaces are listed as added tokens too


class Family(ABC, Generic[F]):
    """One family; an instance without state is registered under its model types."""

    name: ClassVar[str]  # what reports call it
    text_type: ClassVar[str]  # `model_type` of a decoder's own config.json
    whole_type: ClassVar[str | None] = None  # of the config of a multimodal model that holds one as its `text_config`
    whole_class: ClassVar[str | None] = None
    # What its artefacts call themselves. A family may be computed as another one is, and then says so in these.
    reference_type: ClassVar[str]  # `model_type` of the transformers class that computes it
    reference_class: ClassVar[str]
    gguf: ClassVar[str]  # llama.cpp's name of the graph, which is `general.architecture`; "" where it has none
    mlx_type: ClassVar[str]  # mlx-lm's module; "" where it has none
    mlx_module: ClassVar[str] = "model"  # what mlx-lm calls the decoder without its head, `model` of canonical names
    mlx_rounds_embed_scale: ClassVar[bool] = False  # mlx-lm rounds the embedding's factor to bf16, in f32 as well
    mlx_shares_by_cache: ClassVar[bool] = False  # mlx-lm's layers read another's keys through a cache, and else not
    genai_type: ClassVar[str] = "gemma3_text"  # what ONNX Runtime GenAI loads either by

    facts: ClassVar[tuple[Fact, ...]] = COMMON  # rows of a GGUF file's metadata, in the order in which they are written
    wording: ClassVar[Wording]
    fields: type[F]
    sentencepiece: ClassVar[bool] = False  # its tokenizer's merges are those of a SentencePiece model
    partial_rope: ClassVar[bool]  # full layers may rotate a part of a head (proportional RoPE)
    gguf_pads_tables: ClassVar[bool] = False  # per-layer embeddings of fewer ids get rows of the first for the rest
    gguf_reads_keys: ClassVar[int | None] = None  # of so many layers llama.cpp reads what makes keys and values
    gguf_owners: ClassVar[int] = 1  # layers with keys and values of their own that llama.cpp's graph asks for
    default_vocabulary: ClassVar[int]
    default_window: ClassVar[int]
    norm_offset: ClassVar[float]  # a norm multiplies by this plus its weight
    value_norm: ClassVar[bool]
    layer_scalar: ClassVar[bool]
    qk_norm: ClassVar[bool] = True  # queries and keys are normed
    post_norms: ClassVar[bool] = True  # what attention and MLP add is normed
    mlp_norm: ClassVar[Role] = Role.PRE_MLP_NORM  # what transformers calls the norm before the MLP by
    caps_attention: ClassVar[bool] = False  # llama.cpp's graph and mlx-lm's module soft-cap attention scores
    bidirectional: ClassVar[bool] = False
    names: ClassVar[Dialect] = CANONICAL  # of the tensors in its checkpoints

    def claims(self, config: dict[str, Any]) -> bool:
        """Whether a config is this family's though its `model_type` is another's."""
        return False

    def embedder(self, config: dict[str, Any], hidden: int, path: str | Path) -> Embedder | None:
        """What makes one vector of a text, of a model that does; InputError for what is not done here."""
        return None

    def choice(self, config: dict[str, Any], vocabulary: int) -> tuple[int, int] | None:
        """Two tokens of which the first one's probability, of the two, is what the model says; None where it is not."""
        return None

    def spelt(self, config: dict[str, Any]) -> dict[str, Any]:
        """A decoder's own config as the reference's class spells it."""
        return config

    def canonical_name(self, name: str) -> str:
        """The canonical name of an array of a checkpoint; the name as it is where the decoder has no such tensor."""
        name = canonical_name(name)
        if self.names is CANONICAL:
            return name
        if (place := self.names.find(name)) is not None:
            return CANONICAL.name(*place)
        module, _, key = name.rpartition(".")  # an array beside the weight, perhaps: `….weight_scale`
        place = self.names.find(f"{module}.weight")
        return name if place is None else f"{CANONICAL.name(*place).removesuffix('.weight')}.{key}"

    def decoder(self, config: dict[str, Any], path: str | Path) -> Architecture:
        """The decoder of a config in the reference's spelling; InputError for what is contradictory or not done."""
        try:
            fields = self.fields.model_validate(config)
        except ValidationError as error:
            raise invalid(error, path) from error
        for key, kind in fields.ropes():
            if kind not in ROPES:
                remedy = f"take {key} out for the model's own context length, or give a checkpoint without it"
                raise InputError(path, f"{key}: positions are scaled by {kind}, which is not supported", remedy)
        for problem, present in self.refused(fields).items():
            if present:
                raise InputError(path, f"{problem}, which is not supported", "use a text decoder that the README names")
        try:
            layers = self.layers(fields)
        except ValidationError as error:
            raise invalid(error, path) from error
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise InputError(path, f"the layers are contradictory ({error})", MENDED) from error
        return Architecture(
            vocab_size=fields.vocab_size or self.default_vocabulary,
            hidden_size=fields.hidden_size,
            heads=fields.num_attention_heads,
            layers=layers,
            rms_norm_eps=fields.rms_norm_eps,
            norm_offset=self.norm_offset,
            attention_scale=self.attention_scale(fields),
            sliding_window=fields.sliding_window or self.default_window,
            final_softcap=fields.final_logit_softcapping,
            attention_softcap=self.attention_softcap(fields),
            embed_scale=fields.hidden_size**0.5,
            tied=fields.tie_word_embeddings,
            per_layer=self.per_layer(fields),
            value_norm=self.value_norm,
            experts=self.experts(fields),
            streams=self.streams(fields),
            layer_scalar=self.layer_scalar,
            qk_norm=self.qk_norm,
            post_norms=self.post_norms,
            mlp_norm=self.mlp_norm,
            bidirectional=self.bidirectional,
            max_positions=fields.max_position_embeddings,
            bos_token_id=fields.bos_token_id,
            eos_token_ids=fields.stops(),
            pad_token_id=fields.pad_token_id,
        )

    def config(self, flat: Flat) -> dict[str, Any]:
        """The inverse of `decoder`: config.json in the older spelling, which all programs read, out of flat facts."""
        return {
            **spelt(flat, "vocab_size", "hidden_size", "heads", "layers", "max_positions", "rms_norm_eps", "tied"),
            "intermediate_size": flat["intermediate_size"][0],
            "layer_types": [SLIDING if slides else FULL for slides in flat["sliding"]],
            **self.own_config(flat),
        }

    @abstractmethod
    def own_config(self, flat: Flat) -> dict[str, Any]:
        """What the family spells in a way of its own: heads, RoPE, and what only it has."""

    def file_config(self, flat: Flat, q_norm_factor: float) -> dict[str, Any]:
        """What the config.json of a GGUF file has beside `config`; its query norms were multiplied by a factor."""
        return {}

    def built_in(self, layers: int) -> Flat:
        """What llama.cpp's graph of `layers` layers has built in and no row of `facts` says."""
        return {}

    def mlx_config(self, flat: Flat, source: dict[str, Any]) -> dict[str, Any]:
        """What mlx-lm's config.json has beside `config`; `source` is the checkpoint's own."""
        return {}

    def mlx_whole(self, config: dict[str, Any]) -> dict[str, Any]:
        """mlx-lm's config.json out of all that it says of the decoder."""
        return config

    def unread(self, decoder: Architecture) -> dict[str, tuple[int, ...]]:
        """Tensors that mlx-lm's module and llama.cpp's graph ask for and do not read: canonical names and shapes."""
        return {}

    def gguf_problem(self, flat: Flat) -> str | None:
        """What llama.cpp's graph of the family would compute differently, besides what no graph of it knows."""
        return None

    @abstractmethod
    def mlx_problem(self, flat: Flat) -> str | None:
        """What of a decoder mlx-lm's module for the family cannot be told, as a predicate of the model."""

    def refused(self, fields: F) -> dict[str, bool]:
        """What a config may ask and the decoder here does not do, each with whether this one asks it."""
        return fields.refused()

    @abstractmethod
    def layers(self, fields: F) -> tuple[Layer, ...]:
        """The layers; ValueError and its like for fields that contradict each other."""

    @abstractmethod
    def attention_scale(self, fields: F) -> float:
        """What attention scores are multiplied by."""

    @abstractmethod
    def gguf_attention_scale(self, layers: int, head_dim: int, hidden: int, heads: int) -> float:
        """What llama.cpp's graph multiplies attention scores by, whatever the file says: there is no key for it."""

    def attention_softcap(self, fields: F) -> float | None:
        """What attention scores are capped at."""
        return None

    def per_layer(self, fields: F) -> PerLayerEmbeddings | None:
        """The per-layer embeddings, of a model that has them."""
        return None

    def experts(self, fields: F) -> Experts | None:
        """The experts, of a model that has them."""
        return None

    def streams(self, fields: F) -> Streams | None:
        """The streams, of a model that has several."""
        return None


def invalid(error: ValidationError, path: str | Path) -> InputError:
    """The first of the fields that are not what they should be."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    shown = repr(first["input"])
    return InputError(path, f"{where}: {first['msg'].lower()}, not {shown[:40]}", MENDED)


class RopeFields(BaseModel):
    """transformers' settings of RoPE for one attention type."""

    rope_theta: Positive
    partial_rotary_factor: Annotated[Positive, Field(le=1)] = 1.0
    factor: Positive = 1.0


def rope(given: dict[str, Any], head_dim: int) -> Rope:
    """RoPE of a layer out of transformers' settings for its attention type; ValidationError for what is absurd."""
    kind, fields = kind_of(given), RopeFields.model_validate(given)
    part = fields.partial_rotary_factor if kind == "proportional" else 1.0
    factor = 1.0 if kind == "default" else fields.factor
    return Rope(theta=fields.rope_theta, rotary_dims=2 * int(part * head_dim // 2), factor=factor)


def spelt_rope(flat: Flat, kind: str) -> dict[str, Any]:
    """The inverse of `rope`: transformers' settings for the attention type `kind` out of flat facts."""
    theta, factor = flat[f"{kind}.rope.theta"], flat[f"{kind}.rope.factor"]
    head_dim, turned = flat[f"{kind}.head_dim"], flat[f"{kind}.rope.rotary_dims"]
    if turned != head_dim:
        part = turned / head_dim
        if 2 * int(part * head_dim // 2) < turned:  # the product must not be rounded below what it was divided from
            part = math.nextafter(part, 2.0)
        spelling = {"rope_type": "proportional", "partial_rotary_factor": part, "rope_theta": theta}
        return spelling if factor == 1.0 else spelling | {"factor": factor}
    if factor != 1.0:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}
