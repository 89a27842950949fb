"""Gemma's mobile checkpoints (`quant_method` "gemma"): codes of 2, 4 and 8 bits with static scales for activations.

The layout is that of `transformers.integrations.gemma_quant`: `weight` and `embedding_quantized` are uint8 with the
lowest bits first and an offset of 2 or 8, or int8 as it is; `weight_scale` `[out, blocks]` and `embedding_scale`
`[rows, blocks]` are floats; activation scales are single numbers, and 0 is one that was not calibrated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from gemexport.formats.activations import Activations, CacheActivations, LinearActivations, Quantizer
from gemexport.formats.checkpoint import Source, check_head, stored_arrays
from gemexport.formats.gemma.architecture import Architecture, TensorSpec
from gemexport.formats.gemma.families import by_type
from gemexport.formats.gemma.model import Model, describe
from gemexport.formats.gemma.names import EMBEDDING, HEAD, layer_module, module_of
from gemexport.formats.gemma.roles import Role
from gemexport.formats.storage.bitpack import signed, unpack
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.patterns import Pattern
from gemexport.formats.storage.safetensors import FLOAT_DTYPES, MappedArray, MappedTensor
from gemexport.formats.tensor import DType, Grid, Rows, Tensor, TensorBase, from_bf16, on_grid

SAVE_AGAIN, OWN_CONFIG = "save or download the model again", "use the config.json that came with the model"
# A converted module of transformers: at the start up to a border, by a pattern with that border, or at the end.
_BORDER = r"(?:(?<=\.)|(?=\.|$))"
_CACHE = r"{}\.(?:.+\.)?[kv]_cache_scale$"  # of a layer


class _Module(BaseModel):
    """What a pattern says of the modules whose names it matches."""

    model_config = ConfigDict(extra="forbid")

    num_bits: Literal[2, 4, 8] | None = None


class _Settings(BaseModel):
    """`quantization_config`, with the defaults of transformers."""

    num_bits: Literal[2, 4, 8] = 4
    quantize_embeddings: bool = False
    module_quant_configs: dict[str, _Module] | None = None
    modules_to_not_convert: list[str] | None = None


class Widths:
    """How wide the codes of each module are, by the rules of `replace_with_quant_layers` in transformers.

    Patterns are tried in their order wherever a name first matches any of them. Names are those of the class that
    transformers makes of the config: the decoder of a multimodal one is `model.language_model`.
    """

    def __init__(self, config: Mapping[str, Any], path: Path, tied: bool) -> None:
        try:
            self._settings = _Settings.model_validate(config["quantization_config"])
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, ("quantization_config", *first["loc"])))
            raise InputError(path, f"{where}: {first['msg'].lower()}", OWN_CONFIG) from error
        kind = str(config.get("model_type"))
        family = by_type(kind)
        wrapped = family is not None and kind == family.whole_type
        self._prefix = "model.language_model." if wrapped else "model."
        patterns = self._settings.module_quant_configs or {}
        named = [f"(?P<g{i}>{pattern})" for i, pattern in enumerate(patterns)]
        self._matcher = _compile("|".join(named), path, "module_quant_configs") if named else None
        skipped = self._settings.modules_to_not_convert
        if skipped is None:  # what transformers leaves in full precision unless it is told otherwise
            skipped = [module_of(HEAD), *([self._converted(module_of(EMBEDDING))] if tied else [])]
        self._skipped = [(_compile(f"(?:{key}){_BORDER}", path, "modules_to_not_convert"), key) for key in skipped]

    def _converted(self, module: str) -> str:
        """The name of a module of the decoder in the model that transformers makes."""
        return f"{self._prefix}{module.removeprefix('model.')}"

    def bits(self, spec: TensorSpec) -> int | None:
        """The width of a matrix' codes; None for one in floating point."""
        if spec.role.is_looked_up and not self._settings.quantize_embeddings:
            return None
        module = module_of(spec.name)
        name = module if spec.role is Role.HEAD else self._converted(module)
        if any(pattern.match(name) or name.endswith(key) for pattern, key in self._skipped):
            return None
        match = self._matcher.search(name) if self._matcher else None
        if match is None:
            return self._settings.num_bits
        assert self._settings.module_quant_configs is not None
        rules = enumerate(self._settings.module_quant_configs.values())
        rule = next(rule for i, rule in rules if match[f"g{i}"] is not None)
        return rule.num_bits or self._settings.num_bits


def _compile(pattern: str, path: Path, where: str) -> Pattern:
    return Pattern(pattern, path, f"quantization_config.{where}", OWN_CONFIG)


class PackedRows(TensorBase):
    """A matrix `[out, in]` of packed codes and their scales, mapped."""

    dtype: DType = "f32"

    def __init__(self, name: str, shape: tuple[int, ...], codes: MappedArray, scales: MappedArray, bits: int) -> None:
        self.name, self.shape = name, shape
        self._codes, self._scales, self._scale_dtype = codes, scales, FLOAT_DTYPES[scales.entry.dtype]
        self.grid = Grid(bits, shape[1] // scales.entry.shape[1], self._scale_dtype, lossless=True)

    def rows(self, start: int, stop: int) -> Rows:
        stored, bits = self._codes.array[start:stop], self.grid.bits
        codes = np.asarray(stored) if bits == 8 else signed(unpack(stored, bits, self.shape[1]), bits)
        scales = self._scales.array[start:stop]
        floats = from_bf16(scales) if self._scale_dtype == "bf16" else np.asarray(scales, np.float32)
        return on_grid(self.grid, codes, floats)


def source(folder: Path, config: dict[str, Any]) -> Source:
    """The decoder's tensors with the codes, scales and activation scales of the file.

    Raises InputError for a packed shape that is not the weight's, missing or unfit scales, widths that are not known,
    and patterns that are no regular expressions.
    """
    path = folder / "config.json"
    model = describe(config, path)
    widths = Widths(config, path, model.decoder.tied)
    files = _Files(folder, model)
    check_head(folder, model, files.arrays)
    tensors: dict[str, Tensor] = {}
    linears: dict[str, LinearActivations] = {}
    for name, spec in model.specs.items():
        module = module_of(name)
        bits = widths.bits(spec) if spec.role.is_matrix else None
        tensors[name] = files.plain(name, spec.shape) if bits is None else files.packed(spec, bits)
        if bits is not None and not spec.role.is_looked_up:
            sides = (files.quantizer(f"{module}.{side}_activation_scale") for side in ("input", "output"))
            linears[name] = LinearActivations(*sides)
    caches, notes = _caches(model.decoder, files)
    activations = Activations({name: both for name, both in linears.items() if both.input or both.output}, caches)
    return Source(tensors, files.left_out(), notes, activations or None)


class _Files:
    """What the files of a checkpoint hold, by canonical name, and what of it was asked for."""

    def __init__(self, folder: Path, model: Model) -> None:
        self.folder = folder
        self.arrays = stored_arrays(folder, model)
        self._taken: set[str] = set()

    def left_out(self) -> tuple[str, ...]:
        """What nobody asked for."""
        return tuple(sorted(set(self.arrays) - self._taken))

    def _take(self, name: str) -> MappedArray:
        array = self.arrays.get(name)
        if array is None:
            raise InputError(self.folder, f"the tensor {name} is missing", SAVE_AGAIN)
        self._taken.add(name)
        return array

    def _floats(self, name: str) -> MappedArray:
        array = self._take(name)
        if array.entry.dtype not in FLOAT_DTYPES:
            raise InputError(array.path, f"tensor {name} is stored as {array.entry.dtype}, not as floats", OWN_CONFIG)
        return array

    def plain(self, name: str, shape: tuple[int, ...]) -> MappedTensor:
        """A tensor in floating point."""
        array = self._floats(name)
        if array.entry.shape != shape and not (shape == (1,) and array.entry.shape == ()):
            problem = f"tensor {name} has the shape {list(array.entry.shape)} where config.json says {list(shape)}"
            raise InputError(array.path, problem, OWN_CONFIG)
        return MappedTensor(array, name, shape)

    def packed(self, spec: TensorSpec, bits: int) -> PackedRows:
        """A matrix of codes of `bits` bits with its scales."""
        name, shape = spec.name, spec.shape
        module, kind = module_of(name), "weight"
        codes_name = name
        if spec.role.is_looked_up:
            kind, codes_name = "embedding", f"{module}.embedding_quantized"
        codes, scales = self._take(codes_name), self._floats(f"{module}.{kind}_scale")
        dtype, per = ("I8", 1) if bits == 8 else ("U8", 8 // bits)
        packed = (shape[0], -(-shape[1] // per))
        if (codes.entry.dtype, codes.entry.shape) != (dtype, packed):
            found = f"{codes.entry.dtype} {list(codes.entry.shape)}"
            problem = f"tensor {codes_name} is {found} where {bits} bits for {list(shape)} take {dtype} {list(packed)}"
            raise InputError(codes.path, problem, OWN_CONFIG)
        size = scales.entry.shape
        if len(size) != 2 or size[0] != shape[0] or not size[1] or shape[1] % size[1]:
            problem = f"tensor {module}.{kind}_scale is {list(size)}, no scale for each row or block of {list(shape)}"
            raise InputError(scales.path, problem, SAVE_AGAIN)
        return PackedRows(name, shape, codes, scales, bits)

    def quantizer(self, name: str) -> Quantizer | None:
        """The int8 activations of a scale; None when there is none, or it was not calibrated."""
        if name not in self.arrays:
            return None
        array = self._take(name)
        scale = self.number(name)
        if scale is None or not np.isfinite(scale) or scale < 0:
            problem = f"tensor {name} is not one number of 0 or more ({array.entry.dtype} {list(array.entry.shape)})"
            raise InputError(array.path, problem, SAVE_AGAIN)
        return Quantizer(scale) if scale else None

    def number(self, name: str) -> float | None:
        """The float that an array of one holds; None for other arrays."""
        array = self.arrays[name]
        if array.entry.dtype not in FLOAT_DTYPES or array.entry.shape not in ((), (1,)):
            return None
        return float(MappedTensor(array).numpy().reshape(()))


def _caches(decoder: Architecture, files: _Files) -> tuple[dict[int, CacheActivations], tuple[str, ...]]:
    """The int8 caches of the layers that own one, and a note on those whose scale is not one number."""
    caches: dict[int, CacheActivations] = {}
    strange = []
    for layer in decoder.layers:
        kinds: dict[str, Quantizer | None] = {}
        scales = re.compile(_CACHE.format(re.escape(layer_module(layer.index))))
        for name in filter(scales.match, files.arrays if layer.owns_cache else ()):
            if files.number(name) is None:
                strange.append(name)
            else:
                kinds["value" if name.endswith(".v_cache_scale") else "key"] = files.quantizer(name)
        if any(kinds.values()):
            caches[layer.index] = CacheActivations(**kinds)
    note = f"{len(strange)} scales of caches are not one number each and are left out ({', '.join(strange[:2])})"
    return caches, (note,) if strange else ()
