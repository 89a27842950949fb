"""`quantization_config` of compressed-tensors folders: which scheme each module has, and what else is quantized.

The names and defaults are those of compressed_tensors.quantization (QuantizationConfig, QuantizationScheme,
QuantizationArgs) in version 0.20.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator

from gemexport.formats.gemma.names import EMBEDDINGS
from gemexport.formats.modules import Group, Module, settings
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.patterns import MAX_PATTERNS, Pattern

FORMATS = (
    "dense",
    "float-quantized",
    "int-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "pack-quantized",
)
EMBEDDING, PATTERN = "Embedding", "re:"
OWN_CONFIG = "use the config.json that came with the model"


Block = Annotated[int, Field(gt=0, le=1 << 20)]


class Args(BaseModel):
    """How numbers are quantized: weights, activations or the KV cache."""

    model_config = ConfigDict(frozen=True)

    num_bits: Annotated[int, Field(strict=True, ge=1, le=32)] = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: Group | None = None
    block_structure: tuple[Block, Block] | None = None
    dynamic: bool | str = False

    @field_validator("block_structure", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return value.split("x") if isinstance(value, str) else value  # "128x128", the older spelling

    def __str__(self) -> str:
        return f"{self.num_bits}-bit {self.type}, {'dynamic' if self.dynamic else 'static'}"


class Scheme(BaseModel):
    """What the modules that `targets` name have in common."""

    model_config = ConfigDict(frozen=True)

    targets: tuple[str, ...]
    weights: Args | None = None
    input_activations: Args | None = None
    output_activations: Args | None = None
    format: str | None = None


class Quantization(BaseModel):
    """The part of config.json that a reader needs."""

    model_config = ConfigDict(frozen=True)

    config_groups: dict[str, Scheme | tuple[str, ...]] = {}  # a tuple: the targets of a scheme known by its name
    format: str = "dense"
    kv_cache_scheme: Args | None = None
    transform_config: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None
    _patterns: dict[str, Pattern] = PrivateAttr(default_factory=dict)  # by the targets that are some

    def scheme(self, module: Module) -> Scheme | None:
        """The scheme of a module: of a group that names it, of one with a pattern for it, else of one for its class.

        Targets call it as the program did that had the model loaded; a multimodal one is saved under other names.
        """
        inner = module.stem.removeprefix("model.")
        names = (module.stored_name, module.stem, f"model.language_model.{inner}", f"language_model.model.{inner}")
        embedding = module.name in EMBEDDINGS
        groups = [group for group in self.config_groups.values() if isinstance(group, Scheme)]
        targets = [(target, group) for group in groups for target in group.targets]
        named = [pair for pair in targets if self._named(pair[0], names)]
        if named:  # the first in the library's order (compressed_tensors.utils.match.match_targets)
            return min(named, key=lambda pair: (pair[0].startswith(PATTERN), pair[0]))[1]
        for target, group in targets:
            if _is_class(target) and target.endswith(EMBEDDING) == embedding:
                return group
        return None

    def _named(self, target: str, names: tuple[str, ...]) -> bool:
        if target.startswith(PATTERN):
            return any(self._patterns[target].match(name) for name in names)
        return target in names


def _is_class(target: str) -> bool:
    """Whether a target names a class, as `Linear` does; `lm_head` names a module."""
    return target[:1].isupper() and "." not in target


def quantization(path: Path, config: dict[str, Any]) -> Quantization:
    """The settings in `config`, which is config.json at `path`.

    Raises InputError for settings that are not understood, and for formats and transforms that are not known here.
    """
    found = settings(Quantization, path, config.get("quantization_config") or {})
    formats = {group.format or found.format for group in found.config_groups.values() if isinstance(group, Scheme)}
    unknown = sorted(formats - set(FORMATS))
    if unknown:
        remedy = f"give a folder in the format {' or '.join(FORMATS)}"
        raise InputError(path, f"the format {', '.join(unknown)} of compressed-tensors is not known", remedy)
    if (found.transform_config or {}).get("config_groups"):
        problem = "the model rotates its activations while it runs (transform_config)"
        raise InputError(path, problem, "compress it without transforms")
    if (found.sparsity_config or {}).get("format", "dense") != "dense":
        raise InputError(path, "the weights are stored sparse (sparsity_config)", "save the model dense")
    targets = [
        target
        for group in found.config_groups.values()
        for target in (group.targets if isinstance(group, Scheme) else group)
        if target.startswith(PATTERN)
    ]
    if len(targets) > MAX_PATTERNS:
        raise InputError(path, f"config_groups have {len(targets)} patterns", OWN_CONFIG)
    found._patterns.update(
        {target: Pattern(target.removeprefix(PATTERN), path, "a target", OWN_CONFIG) for target in targets}
    )
    return found
