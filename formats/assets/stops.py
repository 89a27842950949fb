"""Where an answer ends: one set of tokens for all formats, out of the four places where a checkpoint says it.

transformers stops at `eos_token_id` of generation_config.json, or else of config.json; a chat model's turn ends with
the tokenizer's EOS, or with what its chat template puts behind an answer, and programs differ in which they look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from gemexport.formats.gemma.fields import Padding, TokenId
from gemexport.formats.storage.errors import InputError

GENERATION = "generation_config.json"
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1e9)]


class Generation(BaseModel):
    """What is used of generation_config.json."""

    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | Annotated[list[TokenId], Field(max_length=1 << 10)] | None = None
    pad_token_id: Padding = None
    do_sample: Annotated[bool, Field(strict=True)] | None = None
    temperature: Number | None = None
    top_k: Annotated[int, Field(strict=True, ge=0, lt=1 << 31)] | None = None
    top_p: Annotated[Number, Field(le=1)] | None = None
    min_p: Annotated[Number, Field(le=1)] | None = None
    repetition_penalty: Number | None = None


def check(path: Path, generation: Mapping[str, Any]) -> Generation:
    """The settings in generation_config.json; InputError, naming the key, for what is absurd."""
    try:
        return Generation.model_validate(generation)
    except ValidationError as error:
        first = error.errors()[0]
        where, shown = ".".join(map(str, first["loc"])), repr(first["input"])
        remedy = f"use the {GENERATION} that came with the model"
        raise InputError(path, f"{where}: {first['msg'].lower()}, not {shown[:40]}", remedy) from error


def effective(said: Generation, config: Sequence[int], tokenizer: int | None, turn: int | None, rows: int) -> list[int]:
    """The tokens that end an answer, those that transformers stops at first; none that the model has no row for."""
    listed = said.eos_token_id
    own = [*config] if listed is None else [listed] if isinstance(listed, int) else listed
    found = dict.fromkeys([*own, *(index for index in (tokenizer, turn) if index is not None)])
    return [index for index in found if index < rows]


def named(ids: Sequence[int]) -> int | list[int] | None:
    """Ids as a config has them: one, several or none."""
    return ids[0] if len(ids) == 1 else [*ids] or None
