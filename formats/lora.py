"""A PEFT LoRA adapter beside a base checkpoint, merged row by row as it is read: w + scaling * B @ A, in float32.

An adapter folder holds `adapter_config.json` and `adapter_model.safetensors` with two factors for each module that it
changes, A `[rank, in]` and B `[out, rank]`; scaling is alpha / rank, or alpha / sqrt(rank) with `use_rslora`
(peft.tuners.lora.layer). Whatever changes the product in another way is refused by its name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.families.family import Family
from gemexport.formats.gemma.names import CANONICAL, EMBEDDING, HEAD, module_of
from gemexport.formats.gemma.roles import Role
from gemexport.formats.grids.lattice import jit
from gemexport.formats.modules import settings
from gemexport.formats.stamps import ADAPTER
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.patterns import MAX_PATTERNS, Pattern
from gemexport.formats.storage.reading import opened, read_json
from gemexport.formats.storage.safetensors import FLOAT_DTYPES, MappedArray, MappedTensor, read_file
from gemexport.formats.tensor import DType, Floats, Grid, Rows, Tensor, TensorBase, slices

CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"
# The factors of a linear, and of an embedding, whose rows are the columns of its A.
_FACTOR = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_(embedding_)?(A|B)(?:\.default)?(?:\.weight)?$")
# Weights of the base that peft saves beside them: of the layer under a factor, and of embeddings when asked for them.
_ENDS = "|".join(module_of(name).rpartition(".")[2] for name in (EMBEDDING, HEAD))
_BASE = re.compile(rf"^(?:base_model\.model\.)?(?:(.+)\.base_layer|((?:.+\.)?(?:{_ENDS})))\.weight$")
_TOWER = re.compile(r"vision|audio|projector")
_MERGE = "merge it with peft (merge_and_unload) and give the merged checkpoint"
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
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)


class Settings(BaseModel):
    """What decides the product, of peft's LoraConfig."""

    peft_type: str
    r: int = Field(gt=0)
    lora_alpha: float = Field(allow_inf_nan=False)
    use_rslora: bool = False
    bias: str = "none"
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]] = Field(default={}, max_length=MAX_PATTERNS)
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default={}, max_length=MAX_PATTERNS)


@dataclass(frozen=True)
class Factors:
    """The two factors of one module, mapped: `left` `[out, rank]` times `right` `[rank, in]`, times `scaling`."""

    a: MappedArray
    b: MappedArray
    embedding: bool  # its rows are the columns of A, its columns the rows of B
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product, `[out, in]`."""
        inner, outer = self.a.entry.shape[1], self.b.entry.shape[0]
        return (inner, outer) if self.embedding else (outer, inner)

    def left(self, start: int, stop: int) -> Floats:
        """Rows of the left factor."""
        if self.embedding:
            return np.ascontiguousarray(_floats(self.a)[:, start:stop].T)
        return np.ascontiguousarray(MappedTensor(self.b).rows(start, stop).values)

    def right(self) -> Floats:
        """The whole right factor: a thin one."""
        return np.ascontiguousarray(_floats(self.b).T if self.embedding else _floats(self.a))


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that was opened."""

    path: Path
    modules: Mapping[str, Factors]  # by canonical name of the module
    copies: Mapping[str, MappedArray]  # weights of the base that came along, by canonical name of the module

    def digest(self) -> str:
        """A digest of its two files: another adapter, or the same one trained further, has another."""
        digest = hashlib.sha256()
        for name in (CONFIG, WEIGHTS):
            with opened(self.path / name) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


class MergedTensor(TensorBase):
    """A tensor of the base with its adapter's product added, in float32 and on no grid; the base stays as it is."""

    grid: Grid | None = None
    dtype: DType = "f32"

    def __init__(self, base: Tensor, factors: Factors) -> None:
        self.name, self.shape = base.name, base.shape
        self._base, self._factors = base, factors

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`, merged now."""
        values = np.ascontiguousarray(self._base.rows(start, stop).values, dtype=np.float32)
        return Rows(_merged(values, self._factors.left(start, stop), self._factors.right(), self._factors.scaling))


@jit
def _merged(
    values: NDArray[np.float32], left: NDArray[np.float32], right: NDArray[np.float32], scaling: float
) -> NDArray[np.float32]:
    """values + scaling * left @ right, rounded once: sums in float64 and in a fixed order, however rows are sliced."""
    result = np.empty_like(values)
    total = np.empty(values.shape[1], np.float64)
    for row in range(values.shape[0]):
        total[:] = 0.0
        for k in range(left.shape[1]):
            factor = np.float64(left[row, k])
            for i in range(values.shape[1]):
                total[i] += factor * np.float64(right[k, i])
        for i in range(values.shape[1]):
            result[row, i] = np.float32(np.float64(values[row, i]) + scaling * total[i])
    return result


def _floats(stored: MappedArray) -> Floats:
    return MappedTensor(stored).numpy()


def open_adapter(folder: Path, family: Family[Any]) -> Adapter:
    """The adapter in `folder` of a model of `family`; reads its config and headers.

    Raises InputError for a folder that is none, for factors that are missing or of another rank than the config says,
    and for a kind of adapter whose merged weights are not w + scaling * B @ A.
    """
    if not folder.is_dir():
        raise InputError(folder, "there is no such folder", "give the folder of a LoRA adapter of peft")
    config, path = _config(folder), folder / WEIGHTS
    if not path.is_file():
        remedy = "save the adapter as safetensors (save_pretrained of peft)"
        raise InputError(folder, f"there is no {WEIGHTS}", remedy)
    pairs: dict[str, dict[str, MappedArray]] = {}
    copies: dict[str, MappedArray] = {}
    for name, array in read_file(path).items():
        factor, copy = _FACTOR.match(name), _BASE.match(name)
        if array.entry.dtype not in FLOAT_DTYPES or len(array.entry.shape) != 2:
            raise InputError(path, f"the tensor {name} is no matrix of floats", _SAVE)
        if factor is not None:
            found = pairs.setdefault(factor[1], {})
            if (key := f"{factor[2] or ''}{factor[3]}") in found:
                raise InputError(path, f"the factor {name} is there twice", _SAVE)
            found[key] = array
        elif copy is not None:
            copies[_canonical(copy[1] or copy[2], family)] = array
        else:
            raise InputError(path, f"the tensor {name} is no factor of a LoRA", _MERGE)
    ranks, alphas = (_Patterns(path, key, getattr(config, key)) for key in ("rank_pattern", "alpha_pattern"))
    modules = {}
    for name, pair in pairs.items():
        rank, alpha = ranks.of(name, config.r), alphas.of(name, config.lora_alpha)
        scaling = alpha / (sqrt(rank) if config.use_rslora else rank)
        modules[_canonical(name, family)] = _factors(path, name, pair, rank, scaling)
    if not modules or len(modules) != len(pairs):
        problem = "holds a module under two names" if modules else "holds no factors of a LoRA"
        raise InputError(path, problem, "give the folder of a LoRA adapter of peft")
    return Adapter(folder, modules, copies)


def _canonical(module: str, family: Family[Any]) -> str:
    return family.canonical_name(f"{module}.weight").removesuffix(".weight")


def _config(folder: Path) -> Settings:
    """adapter_config.json, of an adapter that can be merged here."""
    path = folder / CONFIG
    try:
        found = read_json(path, _SAVE)
    except FileNotFoundError as error:
        raise InputError(folder, f"there is no {CONFIG}", "give the folder of a LoRA adapter of peft") from error
    if "peft_type" not in found and ("lora_parameters" in found or "fine_tune_type" in found):
        fuse = f"mlx_lm.fuse --model BASE --adapter-path {folder} --save-path MERGED, and give MERGED"
        raise InputError(path, "the adapter is one of mlx-lm", f"merge it with {fuse}")
    if found.get("peft_type") != "LORA":
        raise InputError(path, f"the adapter is a {found.get('peft_type')}, not a LORA", _MERGE)
    config = settings(Settings, path, found)
    refused = [name for name in _REFUSED if found.get(name)]
    if config.bias != "none":
        refused.append(f"bias {config.bias}")
    if config.fan_in_fan_out:
        refused.append("fan_in_fan_out")
    if str(config.init_lora_weights).startswith(_CHANGES_BASE):
        refused.append(f"init_lora_weights {config.init_lora_weights}")
    if refused:
        raise InputError(path, f"the adapter has {', '.join(refused)}, which cannot be merged here", _MERGE)
    return config


def _factors(path: Path, name: str, found: dict[str, MappedArray], rank: int, scaling: float) -> Factors:
    """The factors of the module that the file calls `name`, if they are two of the rank that the config says."""
    embedding = "embedding_A" in found or "embedding_B" in found
    prefix = "embedding_" if embedding else ""
    a, b = found.get(f"{prefix}A"), found.get(f"{prefix}B")
    if a is None or b is None or len(found) != 2:
        raise InputError(path, f"{name} has {' and '.join(sorted(found))} for factors", _SAVE)
    ranks = (a.entry.shape[0], b.entry.shape[1])
    if ranks != (rank, rank):
        problem = f"the factors of {name} have the ranks {ranks[0]} and {ranks[1]}, where {CONFIG} says {rank}"
        raise InputError(path, problem, f"use the {CONFIG} that came with the adapter")
    return Factors(a, b, embedding, scaling)


class _Patterns:
    """Numbers by patterns: what the first says that ends a module's name (peft.utils.other.get_pattern_key)."""

    def __init__(self, path: Path, key: str, numbers: Mapping[str, Any]) -> None:
        config = path.with_name(CONFIG)
        self._numbers = [(Pattern(rf"(.*\.)?({text})$", config, key, _SAVE), value) for text, value in numbers.items()]

    def of(self, name: str, usual: Any) -> Any:
        """The number of a module, `usual` where no pattern has its name."""
        return next((value for pattern, value in self._numbers if pattern.match(name)), usual)


def adapted(base: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint `base` with the adapter in `folder` merged in, and notes that say so.

    Raises InputError for what `open_adapter` refuses, and for an adapter of another base: one that changes what the
    base does not have, in other shapes, or that brings other embeddings along.
    """
    adapter = open_adapter(folder, base.model.family)
    merged: dict[str, Tensor] = {}
    towers, shared = 0, list[str]()
    for module, factors in adapter.modules.items():
        tensor = base.tensors.get(f"{module}.weight")
        if tensor is None and _TOWER.search(module):
            towers += 1
        elif _is_shared(base, module):
            shared.append(module)
        else:
            merged[f"{module}.weight"] = MergedTensor(_fitting(base, module, tensor, factors, folder), factors)
    _check_copies(base, adapter)
    name = folder.resolve().name
    notes = [f"the adapter {name} is merged into {len(merged)} matrices, in f32"]
    if towers:
        notes.append(f"the adapter's changes to {towers} modules of towers are left out")
    if shared:
        unused = "whose layers read the keys and values of another one and never compute them"
        notes.append(f"the adapter's changes to {len(shared)} modules are left out, {unused}: {', '.join(shared[:4])}")
    if base.architecture.tied and module_of(EMBEDDING) in adapter.modules:
        notes.append("the output head is the embedding table, and changes with it as in peft's merge_and_unload")
    return replace(
        base,
        name=f"{base.name}-{name}",
        tensors={**base.tensors, **merged},
        notes=(*base.notes, *notes),
        adapter=adapter.digest(),
        bases={name: base.tensors[name] for name in merged},
    )


def _is_shared(base: Checkpoint, module: str) -> bool:
    """Whether a module would make keys or values in a layer that reads those of another one: no program calls it."""
    role, layer = CANONICAL.find(f"{module}.weight") or (None, None)
    layers = base.architecture.layers
    return role in (Role.K, Role.V) and layer is not None and layer < len(layers) and not layers[layer].owns_cache


def _fitting(base: Checkpoint, module: str, tensor: Tensor | None, factors: Factors, folder: Path) -> Tensor:
    """The base's tensor that a module's product is added to; InputError when there is none of that shape."""
    remedy = "give the base that the adapter was made for"
    if tensor is None:
        problem = "which the base does not have"
        if module == module_of(HEAD) and base.architecture.tied:
            copied = f"copy {module_of(EMBEDDING)} to {module_of(HEAD)}"
            problem = "which is the embedding table here: the embedding would change with it"
            remedy = f"give the base a head of its own ({copied}, tie_word_embeddings false)"
        raise InputError(folder / WEIGHTS, f"the adapter changes {module}, {problem}", remedy)
    if factors.shape != tensor.shape:
        problem = f"the factors of {module} make {list(factors.shape)}, the base has {list(tensor.shape)}"
        raise InputError(folder / WEIGHTS, problem, remedy)
    return tensor


def _check_copies(base: Checkpoint, adapter: Adapter) -> None:
    """Raise InputError unless weights that the adapter brings along are the base's own."""
    for module, stored in adapter.copies.items():
        if _is_shared(base, module):
            continue
        source = module_of(EMBEDDING) if module == module_of(HEAD) and base.architecture.tied else module
        tensor, copy = base.tensors.get(f"{source}.weight"), MappedTensor(stored)
        same = tensor is not None and tensor.shape == copy.shape
        if tensor is not None and same:
            same = all(np.array_equal(tensor.rows(*part).values, copy.rows(*part).values) for part in slices(copy))
        if not same:
            problem = f"the adapter brings {module}.weight along, and it is not the base's"
            raise InputError(adapter.path / WEIGHTS, problem, _MERGE)
