"""An adapter folder of PEFT: its settings, and which factors and which weights of the base it holds.

It holds `adapter_config.json` and `adapter_model.safetensors` with two factors for each module that it
changes, A `[rank, in]` and B `[out, rank]`; scaling is alpha / rank, or alpha / sqrt(rank) with `use_rslora`
(peft.tuners.lora.layer). Whatever changes the product in another way is refused by its name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from gemexport.formats.checkpoint import fuse_remedy, made_by_mlx
from gemexport.formats.gemma.families.family import Family
from gemexport.formats.gemma.names import EMBEDDING, HEAD, module_of
from gemexport.formats.hub import download
from gemexport.formats.lora.product import Factors
from gemexport.formats.modules import settings
from gemexport.formats.stamps import ADAPTER
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.patterns import MAX_PATTERNS, Pattern
from gemexport.formats.storage.reading import opened, read_json
from gemexport.formats.storage.safetensors import FLOAT_DTYPES, MappedArray, read_file

CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"
# The factors of a linear, and of an embedding, whose rows are the columns of its A.
_FACTOR = re.compile(
    r"^(?:base_model\.model\.)?(.+)\.lora_(embedding_)?(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?$"
)
# Weights of the base that peft saves beside them: of the layer under a factor, and of embeddings when asked for them or
# when their rows are not the base's in number; trained ones are there twice, and once more as they were before.
_TABLES = tuple(module_of(name).rpartition(".")[2] for name in (EMBEDDING, HEAD))
_ENDS = "|".join(_TABLES)
_BASE = re.compile(
    r"^(?:base_model\.model\.)?(?:(.+)\.base_layer|"
    rf"((?:.+\.)?(?:{_ENDS}))(?:\.modules_to_save(?:\.default)?)?)\.weight$"
)
_BEFORE = re.compile(r"\.original_module\.weight$")
MAGNITUDE = "magnitude_vector"
MERGE = "merge it with peft (merge_and_unload) and give the merged checkpoint"
_SAVE = "save the adapter again"
# Starts that take their factors out of the base, whose weights peft then changes too.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings of LoraConfig that make something else of the product, or of other weights, when they are set.
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


class Settings(BaseModel):
    """What decides the product, of peft's LoraConfig."""

    peft_type: str
    r: int = Field(gt=0)
    lora_alpha: float = Field(allow_inf_nan=False)
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    bias: str = "none"
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]] = Field(default={}, max_length=MAX_PATTERNS)
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default={}, max_length=MAX_PATTERNS)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that was opened."""

    path: Path
    modules: Mapping[str, Factors]  # by canonical name of the module
    copies: Mapping[str, MappedArray]  # weights of the base that came along, by canonical name of the module
    trained: frozenset[str]  # the copies that were trained and take the place of the base's

    def digest(self) -> str:
        """A digest of its two files: another adapter, or the same one trained further, has another."""
        digest = hashlib.sha256()
        for name in (CONFIG, WEIGHTS):
            with opened(self.path / name) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def open_adapter(folder: Path, family: Family[Any]) -> Adapter:
    """The adapter in `folder` of a model of `family`; reads its config and headers.

    Raises InputError for a folder that is none, for factors that are missing or of another rank than the config says,
    and for a kind of adapter whose merged weights are not w + scaling * B @ A.
    """
    if not folder.is_dir():
        usual = "give the folder of a LoRA adapter of peft"
        raise InputError(folder, "there is no such folder", download(folder) or usual)
    config, path = _config(folder), folder / WEIGHTS
    if not path.is_file():
        remedy = "save the adapter as safetensors (save_pretrained of peft)"
        raise InputError(folder, f"there is no {WEIGHTS}", remedy)
    pairs: dict[str, dict[str, MappedArray]] = {}
    copies: dict[str, MappedArray] = {}
    for name, array in read_file(path).items():
        factor, copy = _FACTOR.match(name), _BASE.match(name)
        axes = 1 if factor is not None and factor[3] == MAGNITUDE else 2
        if array.entry.dtype not in FLOAT_DTYPES or len(array.entry.shape) != axes:
            raise InputError(path, f"the tensor {name} is no {'matrix' if axes == 2 else 'vector'} of floats", _SAVE)
        if factor is not None:
            found = pairs.setdefault(factor[1], {})
            if (key := f"{factor[2] or ''}{factor[3]}") in found:
                raise InputError(path, f"the factor {name} is there twice", _SAVE)
            found[key] = array
        elif copy is not None:
            copies[_canonical(copy[1] or copy[2], family)] = array
        elif not _BEFORE.search(name):
            raise InputError(path, f"the tensor {name} is no factor of a LoRA", MERGE)
    ranks, alphas = (_Patterns(path, key, getattr(config, key)) for key in ("rank_pattern", "alpha_pattern"))
    modules = {}
    for name, pair in pairs.items():
        rank, alpha = ranks.of(name, config.r), alphas.of(name, config.lora_alpha)
        scaling = alpha / (sqrt(rank) if config.use_rslora else rank)
        modules[_canonical(name, family)] = _factors(path, name, pair, rank, scaling, config.use_dora)
    if not modules or len(modules) != len(pairs):
        problem = "holds a module under two names" if modules else "holds no factors of a LoRA"
        raise InputError(path, problem, "give the folder of a LoRA adapter of peft")
    saved = tuple(config.modules_to_save or ())
    trained = frozenset(module for module in copies if module.rpartition(".")[2] in saved)
    if lost := {*saved} - {module.rpartition(".")[2] for module in trained}:
        raise InputError(path, f"modules_to_save names {', '.join(sorted(lost))}, which is not there", _SAVE)
    return Adapter(folder, modules, copies, trained)


def _canonical(module: str, family: Family[Any]) -> str:
    return family.canonical_name(f"{module}.weight").removesuffix(".weight")


def _config(folder: Path) -> Settings:
    """adapter_config.json, of an adapter that can be merged here."""
    path = folder / CONFIG
    try:
        found = read_json(path, _SAVE)
    except FileNotFoundError as error:
        raise InputError(folder, f"there is no {CONFIG}", "give the folder of a LoRA adapter of peft") from error
    if made_by_mlx(found):
        raise InputError(path, "the adapter is one of mlx-lm", fuse_remedy(folder))
    if found.get("peft_type") != "LORA":
        raise InputError(path, f"the adapter is a {found.get('peft_type')}, not a LORA", MERGE)
    config = settings(Settings, path, found, "adapter")
    refused = [name for name in _REFUSED if found.get(name)]
    refused += [f"modules_to_save {name}" for name in config.modules_to_save or () if name not in _TABLES]
    if config.bias != "none":
        refused.append(f"bias {config.bias}")
    if config.fan_in_fan_out:
        refused.append("fan_in_fan_out")
    if str(config.init_lora_weights).startswith(_CHANGES_BASE):
        refused.append(f"init_lora_weights {config.init_lora_weights}")
    if refused:
        raise InputError(path, f"the adapter has {', '.join(refused)}, which cannot be merged here", MERGE)
    return config


def _factors(path: Path, name: str, found: dict[str, MappedArray], rank: int, scaling: float, dora: bool) -> Factors:
    """The factors of the module that the file calls `name`, if they are two of the rank that the config says."""
    embedding = any(key.startswith("embedding_") for key in found)
    prefix = "embedding_" if embedding else ""
    a, b, magnitude = found.get(f"{prefix}A"), found.get(f"{prefix}B"), found.get(MAGNITUDE)
    if dora and embedding:
        problem = f"{name} is an embedding with use_dora, which cannot be merged here"
        raise InputError(path, problem, MERGE)
    if a is None or b is None or len(found) != 2 + dora or dora != (magnitude is not None):
        raise InputError(path, f"{name} has {' and '.join(sorted(found))} for factors", _SAVE)
    ranks = (a.entry.shape[0], b.entry.shape[1])
    if ranks != (rank, rank):
        problem = f"the factors of {name} have the ranks {ranks[0]} and {ranks[1]}, where {CONFIG} says {rank}"
        raise InputError(path, problem, f"use the {CONFIG} that came with the adapter")
    if magnitude is not None and magnitude.entry.shape != b.entry.shape[:1]:
        problem = f"the magnitudes of {name} are {list(magnitude.entry.shape)}, its rows {b.entry.shape[0]}"
        raise InputError(path, problem, _SAVE)
    return Factors(a, b, embedding, scaling, magnitude)


class _Patterns:
    """Numbers by patterns: what the first says that ends a module's name (peft.utils.other.get_pattern_key)."""

    def __init__(self, path: Path, key: str, numbers: Mapping[str, Any]) -> None:
        config = path.with_name(CONFIG)
        self._numbers = [(Pattern(rf"(.*\.)?({text})$", config, key, _SAVE), value) for text, value in numbers.items()]

    def of(self, name: str, usual: Any) -> Any:
        """The number of a module, `usual` where no pattern has its name."""
        return next((value for pattern, value in self._numbers if pattern.match(name)), usual)
