"""The fields of a text config that all families share, with transformers' defaults where one may leave them out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

SLIDING, FULL = "sliding_attention", "full_attention"
# What a JSON file may say: no truth value and no text for a number, nothing that is not finite, nothing absurd.
Size = Annotated[int, Field(strict=True, gt=0, lt=1 << 31)]
Least = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
Positive = Annotated[float, Field(strict=True, gt=0, lt=1e30, allow_inf_nan=False)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
Padding = Annotated[TokenId | None, BeforeValidator(lambda value: None if value == -1 else value)]  # -1: no padding


def kind_of(rope: Mapping[str, Any]) -> str:
    """The kind of RoPE that transformers' settings name, in the newer spelling or the older one."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


class TextFields(BaseModel):
    """A decoder's config.json as transformers spells it; a family adds its own fields."""

    model_config = ConfigDict(extra="allow")

    vocab_size: Size | None = None
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: int = Field(gt=0, le=1 << 12, strict=True)  # each becomes an object before any file is looked at
    num_attention_heads: Size = 8
    num_key_value_heads: Size = 4
    head_dim: Size = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    rms_norm_eps: Annotated[Positive, Field(le=1)] = 1e-6
    max_position_embeddings: Size = 131_072
    sliding_window: Size | None = None
    sliding_window_pattern: Size | None = None
    older_pattern: Size | None = Field(default=None, alias="_sliding_window_pattern")
    layer_types: list[Literal["sliding_attention", "full_attention"]] | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    final_logit_softcapping: Positive | None = None
    # By attention type; transformers saves a config in the older spelling with settings of none of them beside these.
    rope_parameters: dict[str, Any] | None = None
    use_bidirectional_attention: bool | str | None = None
    bos_token_id: TokenId | None = 2
    eos_token_id: TokenId | Annotated[list[TokenId], Field(max_length=1 << 10)] | None = 1
    pad_token_id: Padding = 0

    def types(self) -> list[str]:
        """The attention type of each layer."""
        if self.layer_types is not None:
            return list(self.layer_types)
        pattern = self.sliding_window_pattern or self.older_pattern or 6
        return [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(self.num_hidden_layers)]

    def ropes(self) -> Iterator[tuple[str, str]]:
        """The keys that say how positions are rotated, and the kind that each names."""
        given = {"rope_scaling": getattr(self, "rope_scaling", None), "rope_parameters": self.rope_parameters}
        given |= {f"rope_parameters.{kind}": (self.rope_parameters or {}).get(kind) for kind in (SLIDING, FULL)}
        for key, value in given.items():
            if isinstance(value, dict):
                yield key, kind_of(value)

    def stops(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        eos = self.eos_token_id
        return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)

    def refused(self) -> dict[str, bool]:
        """What such a config may ask and no decoder here does, each with whether this one asks it."""
        types = self.types()
        return {
            "attention is bidirectional": self.use_bidirectional_attention in (True, "all"),
            "attention has biases": self.attention_bias,
            f"the activation is {self.hidden_activation}": self.hidden_activation != "gelu_pytorch_tanh",
            f"layer_types names {len(types)} layers of {self.num_hidden_layers}": len(types) != self.num_hidden_layers,
            "heads are not a multiple of key/value heads": self.num_attention_heads % self.num_key_value_heads != 0,
        }
