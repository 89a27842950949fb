"""Folders in Hugging Face layout whose modules keep their weight in several arrays: codes, scales, zero points.

What a reader of such a format shares with the others is here: the arrays by module, plain tensors as they are, and
what is left over. The reader itself says what a quantized module's arrays mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from gemexport.formats.checkpoint import Source, check_head, plain_tensor, stored_arrays
from gemexport.formats.gemma.architecture import TensorSpec
from gemexport.formats.gemma.model import describe
from gemexport.formats.gemma.names import WEIGHT
from gemexport.formats.gemma.stacks import Part, by_expert, put, switched, together
from gemexport.formats.quantized import Layout
from gemexport.formats.storage.bitpack import Unsigned
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.minifloat import is_nan_e4m3
from gemexport.formats.storage.safetensors import MappedArray
from gemexport.formats.tensor import Tensor
from gemexport.formats.unclaimed import check_unclaimed

NARROWEST = 16  # the narrowest block that any format has a container for


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("should be -1, or more than 0")
    return value


# How many columns share a scale, as settings say it: -1 for all of a row.
Group = Annotated[int, Field(strict=True, ge=-1, le=1 << 20), AfterValidator(_not_zero)]
Settings = TypeVar("Settings", bound=BaseModel)


@dataclass(frozen=True)
class Module:
    """A module of the decoder that has a weight `[out, in]`, and the arrays that the files keep of it."""

    name: str  # canonical, of the weight: "model.layers.0.mlp.up_proj.weight"
    shape: tuple[int, ...]
    arrays: Mapping[str, MappedArray]  # by what follows the module's name: "qweight", "scales" …

    def need(self, key: str) -> MappedArray:
        """One of the arrays; InputError when it is missing."""
        found = self.arrays.get(key)
        if found is None:
            path = next(iter(self.arrays.values())).path
            raise InputError(path, f"{self.stem}.{key} is missing", "download or save the model again")
        return found

    @property
    def stem(self) -> str:
        """The module's canonical name."""
        return self.name.removesuffix(".weight")

    @property
    def stored_name(self) -> str:
        """The module's name in the files, which is what settings call it."""
        return next(iter(self.arrays.values())).entry.name.rpartition(".")[0]

    def wrong(self, problem: str, remedy: str = "use the config.json that came with the model") -> InputError:
        """An error that names the module and its file."""
        return InputError(next(iter(self.arrays.values())).path, f"tensor {self.name} {problem}", remedy)


def read_source(folder: Path, config: dict[str, Any], read: Callable[[Module], Tensor | None]) -> Source:
    """The decoder's tensors in `folder`; `read` makes one of a quantized module, and gives None for a plain one.

    Raises InputError for a tensor that is missing or has not the shape that `config` says, for a linear with a bias,
    which a Gemma does not have, for a tensor that no part of the decoder claims, for a head of its own that `config`
    does not know of, and whatever `read` raises.
    """
    model = describe(config, folder / "config.json")
    stored = stored_arrays(folder, model)
    check_head(folder, model, stored)
    modules: dict[str, dict[str, MappedArray]] = {}
    for name, array in stored.items():
        module, _, key = name.rpartition(".")
        modules.setdefault(module, {})[key] = array
    used: dict[str, set[str]] = {}

    def stored_tensor(spec: TensorSpec) -> Tensor:
        stem, _, key = spec.name.rpartition(".")
        arrays = modules.get(stem, {})
        tensor = (
            read(Module(spec.name, spec.shape, arrays)) if arrays and key == "weight" and spec.role.has_rows else None
        )
        if tensor is None:
            used.setdefault(stem, set()).add(key)
            return plain_tensor(folder, spec, arrays.get(key))
        _refuse_bias(stem, arrays)
        used.setdefault(stem, set()).update(arrays)
        return tensor

    tensors: dict[str, Tensor] = {}
    for name, spec in model.specs.items():
        parts = _parts(spec, modules)
        found = [stored_tensor(replace(spec, name=part.name, shape=part.shape)) for part in parts]
        tensors[name] = found[0] if parts[0].name == name else put(spec, zip(parts, found, strict=True))
    left = sorted(f"{stem}.{key}" for stem, arrays in modules.items() for key in arrays.keys() - used.get(stem, set()))
    check_unclaimed(folder, left, model.specs)
    return Source(tensors, left_out=tuple(left))


def _parts(spec: TensorSpec, modules: Mapping[str, Mapping[str, MappedArray]]) -> tuple[Part, ...]:
    """What the files have of a tensor: itself, unless it is one of experts' that is there in a layout of its own."""
    for layout in (by_expert, switched):
        parts = layout(spec)
        if parts[0].name.removesuffix(WEIGHT) in modules:
            return parts
    return together(spec)


def _refuse_bias(stem: str, arrays: Mapping[str, MappedArray]) -> None:
    """Raise InputError for a bias that is not zero: some tools write one that is for every linear."""
    bias = arrays.get("bias")
    if bias is not None and bias.array.any():
        remedy = "give a model of a family that is known here"
        raise InputError(bias.path, f"{stem} has a bias, which no Gemma has", remedy)


def check_stated(path: Path, module: Module, stated: Mapping[str, int | None], bits: int) -> None:
    """Raise InputError where config.json says other `bits` or another `group_size` than a module's arrays have.

    Of arrays with a row of scales for each group, as GPTQ and AWQ have them.
    """
    said, group = stated.get("bits"), stated.get("group_size")
    width, groups = module.shape[1], module.need("scales").entry.shape[0]
    remedy = "use the config.json that came with the model"
    if said is not None and said != bits:
        problem = f"quantization_config.bits is {said}, and {module.name} has codes of {bits} bits"
        raise InputError(path, problem, remedy)
    if group is not None and groups != (1 if group < 0 else -(-width // group)):
        problem = f"quantization_config.group_size is {group}, and {module.name} has {groups} groups in {width} columns"
        raise InputError(path, problem, remedy)


def apart(layout: Layout, module: Module) -> bool:
    """Whether the columns of a group lie apart, so that nothing but their own format holds them."""
    return layout.block < min(NARROWEST, module.shape[-1])


def reordered_note(count: int) -> list[str]:
    """A sentence about modules whose groups are not blocks of consecutive weights; none when there are none."""
    problem = "modules have the columns of a group apart (activation order), which no other format holds"
    return [f"{count} {problem}"] if count else []


def finite_e4m3(module: Module, codes: Callable[[int, int], Unsigned]) -> Callable[[int, int], Unsigned]:
    """Reads E4M3 codes, and raises InputError for one that is NaN."""

    def checked(start: int, stop: int) -> Unsigned:
        found = codes(start, stop)
        if is_nan_e4m3(found):
            raise module.wrong("has NaN weights", "repair or retrain the checkpoint")
        return found

    return checked


def settings(model: type[Settings], path: Path, found: object, of: str = "quantization") -> Settings:
    """Settings `of` something as its reader knows them, from a file beside the model or the adapter.

    InputError, naming the setting, where they are something else.
    """
    try:
        return model.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or f"{of}_config"
        problem = f"the {of} settings are not understood ({where}: {first['msg']}, not {first['input']!r:.40})"
        whose = "adapter" if of == "adapter" else "model"
        raise InputError(path, problem, f"use the {path.name} that came with the {whose}") from error
