"""The fields of a text config that all families share, with transformers' defaults where one may leave them out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SLIDING, FULL = "sliding_attention", "full_attention"
Count = Field(gt=0, le=1 << 40)


class TextFields(BaseModel):
    """A decoder's config.json as transformers spells it; a family adds its own fields."""

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
    # By attention type; transformers saves a config in the older spelling with settings of none of them beside these.
    rope_parameters: dict[str, Any] | None = None
    use_bidirectional_attention: bool | str | None = None
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = 0

    def types(self) -> list[str]:
        """The attention type of each layer."""
        if self.layer_types is not None:
            return list(self.layer_types)
        pattern = self.sliding_window_pattern or self.older_pattern or 6
        return [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(self.num_hidden_layers)]

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
