"""A whole model: its family, its parts, and what each of its tensors is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gemexport.formats.gemma.architecture import Architecture, TensorSpec
from gemexport.formats.gemma.embedder import Embedder
from gemexport.formats.gemma.families import family_of
from gemexport.formats.gemma.families.family import Family

# Values beside the decoder's own: the whole model's say decides in transformers, and released configs name the end of a
# turn there.
LOGITS, EMBEDDING = "logits", "embedding"
_WHOLE_DECIDES = ("eos_token_id", "tie_word_embeddings")


@dataclass(frozen=True)
class Part:
    """What can be run by itself: a decoder; later a tower, a projector, a drafter."""

    name: str
    tensors: tuple[TensorSpec, ...]  # in the order of use
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    reference: str  # the transformers class that computes it


@dataclass(frozen=True)
class Model:
    """What a config.json describes."""

    family: Family[Any]
    decoder: Architecture
    embedder: Embedder | None = None
    choice: tuple[int, int] | None = None  # tokens of which the first one's probability, of the two, is a verdict

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts, each with its tensors."""
        tensors = tuple(self.decoder.specs())
        if self.embedder is None:
            return (Part("decoder", tensors, ("input_ids",), (LOGITS,), self.family.reference_class),)
        return (
            Part("encoder", tensors, ("input_ids",), ("hidden",), self.family.reference_class),
            Part("embedder", self.embedder.specs(), ("hidden",), (EMBEDDING,), "SentenceTransformer"),
        )

    @property
    def gives(self) -> str:
        """What is judged of the model: `LOGITS` of each position, or the `EMBEDDING` of a text."""
        (found,) = self.parts[-1].gives
        return found

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor of every part, by its canonical name."""
        return {spec.name: spec for part in self.parts for spec in part.tensors}


def text_config(config: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The decoder's own config, in the spelling of the transformers class that computes it.

    It is `config` itself, or the `text_config` of a multimodal one. Raises InputError for a model of no known family.
    """
    family = family_of(config, path)
    if config["model_type"] == family.whole_type:
        inner = config.get("text_config")
        if isinstance(inner, dict):
            whole = {key: config[key] for key in _WHOLE_DECIDES if config.get(key) is not None}
            config = {"model_type": family.text_type, **inner} | whole
        else:
            config = {**config, "model_type": family.text_type}
    return family.spelt(config)


def describe(config: dict[str, Any], path: str | Path) -> Model:
    """The model that `config` (a whole config.json, or a text config) describes.

    Raises InputError, naming `path`, for what is missing, contradictory or not supported.
    """
    family = family_of(config, path)
    decoder = family.decoder(text_config(config, path), path)
    choice = family.choice(config, decoder.vocab_size)
    return Model(family, decoder, family.embedder(config, decoder.hidden_size, path), choice)


def architecture(config: dict[str, Any], path: str | Path) -> Architecture:
    """The decoder of the model that `config` describes; raises as `describe`."""
    return family_of(config, path).decoder(text_config(config, path), path)
