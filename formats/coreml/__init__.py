"""What an .mlpackage on disk holds: the decoder's tensors under their canonical names, with their grids, mapped.

Core ML's names allow letters, digits and underscores only, so `model.layers.0.mlp.up_proj.weight` is stored as
`model_layers_0_mlp_up_proj_weight`; that, with the endings that coremltools gives to converted constants, is undone.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.coreml.arrays import Array, Palette, Stored, matrix_rows
from gemexport.formats.coreml.grids import stack
from gemexport.formats.coreml.package import Package, Value, constant, everything, open_package
from gemexport.formats.gemma.names import CANONICAL, Dialect, is_norm
from gemexport.formats.gemma.roles import Role
from gemexport.formats.grids.additive import AdditiveTensor, Indices
from gemexport.formats.grids.vector_codec import Codec, parse, stated_rms
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import DType, Grid, Rows, Tensor, TensorBase

NORM_OFFSET = "gemexport.norm_offset"  # metadata: what was added to the weights of the norms
BIASES = "_biases"  # after a weight's stored name: the constant of what its program adds to each of its blocks
CODEC = "gemexport.codec."  # metadata, before a weight's stored name: the spelling of the vector codec that it is in
FITTED_RMS = "gemexport.fitted_rms."  # beside it: the error that the fit measured
CODEBOOK, SCALES = "_codebook_", "_scales"  # after a weight's stored name: its palettes of vectors, and its scales
NAMES = Dialect({role: CANONICAL.template(role).replace(".", "_") for role in Role})
_SPELLING = re.compile(
    r"^(?:model_)?(?:language_model_)?(?:model_)?(.+?)(?:_to_fp16|_to_fp32|_quantized|_palettized)*$"
)


def stored_name(canonical: str) -> str:
    """The name of a tensor in a program, which may not have dots."""
    return canonical.replace(".", "_")


def canonical_name(stored: str) -> str | None:
    """The canonical name of a constant of a program, or None if it is none of the decoder's tensors."""
    match = _SPELLING.match(stored)
    places = (NAMES.find(name) for name in (f"model_{match[1]}", match[1])) if match else ()
    place = next(filter(None, places), None)
    return None if place is None else CANONICAL.name(*place)


def tensors(path: str | Path) -> dict[str, Tensor]:
    """The decoder's tensors in the package at `path`, canonical names and values; weights stay unread.

    A linear weight is `[out, in]` as Core ML stores it; tensors that are not the decoder's (tables of RoPE, zero
    biases, constants with names of another program's making) are left out. Raises InputError for a broken package.
    """
    package = open_package(path)
    offset = float(package.metadata.get(NORM_OFFSET, 0.0))
    values = constants(package)
    found: dict[str, Tensor] = {}
    for stored, value in values.items():
        name = canonical_name(stored)
        if name is None or isinstance(value, str | list) or value.kind not in ("fp16", "fp32"):
            continue
        biases = values.get(f"{stored}{BIASES}")
        tensor = stack(name, value, None if isinstance(biases, str | list) else biases)
        found[name] = tensor or CoreMLTensor(name, value, offset if is_norm(name) else 0.0)
    for key, spelling in package.metadata.items():
        name = canonical_name(key.removeprefix(CODEC)) if key.startswith(CODEC) else None
        if name is not None:
            found[name] = _additive(name, parse(spelling), package, values)
    return found


class StackedCodes:
    """The places in several palettes of one shape, as codes `[out, in / V, M]`."""

    def __init__(self, parts: list[Palette]) -> None:
        self._parts = [part.indices for part in parts]
        self.shape = (*self._parts[0].shape, len(parts))

    def __getitem__(self, rows: slice) -> Indices:
        start, stop, _ = rows.indices(self.shape[0])
        return np.stack([np.asarray(part.rows(start, stop), np.uint8) for part in self._parts], axis=2)


def _additive(name: str, codec: Codec, package: Package, values: dict[str, Value]) -> Tensor:
    """A matrix in the vector codec out of a palette for each codebook, and scales."""
    stored = stored_name(name)
    parts = [values.get(f"{stored}{CODEBOOK}{m}") for m in range(codec.codebooks)]
    palettes = [part for part in parts if isinstance(part, Palette)]
    scales = values.get(f"{stored}{SCALES}")
    whole = isinstance(scales, Stored) and len(palettes) == len(parts)
    if not whole or any(
        part.lut.shape[:-2] != (1, 1)
        or part.lut.shape[-1] != codec.vector
        or part.lut.shape[-2] < codec.entries
        or part.indices.shape != palettes[0].indices.shape
        for part in palettes
    ):
        raise InputError(package.path, f"{name} is not in the vector codec {codec}", "export or download it again")
    assert isinstance(scales, Stored)
    books = np.stack([np.asarray(part.lut.numpy(), np.float32)[0, 0, : codec.entries] for part in palettes])
    factors: NDArray[np.floating] = np.asarray(scales.numpy(), np.float16 if scales.kind == "fp16" else np.float32)
    measured = stated_rms(package.metadata.get(f"{FITTED_RMS}{stored}"), package.path)
    return AdditiveTensor(name, codec, StackedCodes(palettes), books, factors, measured)


def constants(package: Package) -> dict[str, Value]:
    """Every constant of the main function by name, quantized ones as arrays that dequantize when read."""
    known: dict[str, Value] = {}
    for operation in everything(package.operations):
        known |= constant(package, operation, known)
    return known


class CoreMLTensor(TensorBase):
    """A constant without a grid as a tensor; `norm_offset` was added to it and is taken off again."""

    grid: Grid | None = None

    def __init__(self, name: str, array: Array, norm_offset: float = 0.0) -> None:
        self.name, self.shape = name, array.shape or (1,)
        self.dtype: DType = "f16" if array.kind == "fp16" else "f32"
        self._array, self._norm_offset = array, np.float32(norm_offset)

    def rows(self, start: int, stop: int) -> Rows:
        values = np.asarray(matrix_rows(self._array, start, stop), np.float32)
        return Rows(values - self._norm_offset if self._norm_offset else values)
