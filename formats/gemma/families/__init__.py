"""The families of Gemma models that are known, by the `model_type` of a config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from gemexport.formats.storage.errors import InputError

FAMILIES: list[Family[Any]] = [
    Gemma3(), Gemma4(), Gemma4Unified(), Gemma2(), Gemma1(), VaultGemma(), ShieldGemma2(), EmbeddingGemma(),
    Gemma3n(),
]  # fmt: skip

# Relatives that are refused by name, and what there would have to be.
RELATIVES = {
    "diffusion_gemma": "DiffusionGemma, which denoises a block of tokens at once and would need an encoder beside the "
    "decoder, attention both ways within the block, and a loop over steps of denoising in every program",
    "embedding_gemma2": "an EmbeddingGemma 2, which makes one vector of a text: attention both ways, pooled, projected",
    "gemma4_assistant": "a drafter of Gemma 4, which runs on another model's keys, values and hidden states",
    "paligemma": "a PaliGemma, whose prompt is attended to both ways",
    "recurrent_gemma": "a RecurrentGemma, whose layers are recurrent",
    "t5gemma": "a T5Gemma, which has an encoder",
}
RELATIVES |= {
    "gemma4_unified_assistant": RELATIVES["gemma4_assistant"],
    "t5gemma2": RELATIVES["t5gemma"],
}


def register(family: Family[Any]) -> None:
    """Make a family known; ValueError when one of its model types is another's."""
    taken = {kind for other in FAMILIES for kind in _types(other)}
    if clash := taken & set(_types(family)):
        raise ValueError(f"{', '.join(sorted(clash))}: there is such a family")
    FAMILIES.append(family)


def by_type(model_type: str) -> Family[Any] | None:
    """The family of a `model_type`, of a decoder's own config or a multimodal one; None when there is none."""
    return next((family for family in FAMILIES if model_type in _types(family)), None)


def named(name: str) -> Family[Any]:
    """The family called so; KeyError when there is none."""
    return {family.name: family for family in FAMILIES}[name]


def by_gguf(architecture: str) -> Family[Any] | None:
    """The family of a GGUF file, by `general.architecture`: of several that are computed alike, the first."""
    return next((family for family in FAMILIES if family.gguf and family.gguf == architecture), None)


def family_of(config: dict[str, Any], path: str | Path) -> Family[Any]:
    """The family of a config.json; InputError, naming `path`, for an architecture that is none of those here."""
    kind = str(config.get("model_type"))
    family = next((family for family in FAMILIES if family.claims(config)), None) or by_type(kind)
    if family is not None and kind == family.whole_type and not isinstance(config.get("text_config"), dict):
        if "num_hidden_layers" not in config:
            problem = f"says that the model is a {kind} with all its parts, and has no text_config for the decoder"
            remedy = f"use the config.json that came with the model, or set model_type to {family.text_type}"
            raise InputError(path, problem, remedy)
        return family  # the decoder's own fields, under the name of the whole
    if kind in RELATIVES:
        raise InputError(path, f"is {RELATIVES[kind]}: no format of it is made here", f"use {_known()}")
    if family is None:
        raise InputError(path, f"the architecture {kind!r} is not known", f"use {_known()}")
    return family


def _known() -> str:
    known = ", ".join(sorted(kind for family in FAMILIES for kind in _types(family)))
    return f"a checkpoint of one of these: {known}"


def _types(family: Family[Any]) -> list[str]:
    return [kind for kind in (family.text_type, family.whole_type) if kind]
