"""Finds a tensor of an artefact by its canonical name, in each format, through that format's own reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gemexport.faults.stored import Q40, Q80, Below, Bytes, Numbers, Packed, Place, Plain, Twice
from gemexport.formats.pieces import Pieces
from gemexport.formats.tensor import row_count


def gguf(path: Path, name: str) -> Place:
    """A tensor of a GGUF file: Q4_0 or plain."""
    from gemexport.formats.gguf import stored_tensors
    from gemexport.formats.gguf.parts import read_parts

    tensor = stored_tensors(read_parts(path))[name]
    data = tensor.blocks(0, row_count(tensor.shape))
    if tensor.type.name == "Q4_0":
        return Q40(data)
    if tensor.type.name == "Q8_0":
        return Q80(data)
    return Plain(data.view({"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.type.name]))


def folder(path: Path, name: str) -> Place:
    """A tensor of an MLX or a compressed-tensors folder: codes in words or in bytes, or plain."""
    from gemexport.formats.gemma.names import canonical_name
    from gemexport.formats.storage.safetensors import read_folder

    arrays = {canonical_name(key): item.array for key, item in read_folder(path).items()}
    stem = name.removesuffix(".weight")
    scheme = f"{stem}.weight_scale"
    if f"{stem}.weight_packed" in arrays:
        packed = arrays[f"{stem}.weight_packed"]
        return Packed(packed, [arrays[scheme]], bits=_bits(packed, int(arrays[f"{stem}.weight_shape"][-1])))
    if scheme in arrays:
        return Bytes(arrays[name], arrays[scheme], 8)
    if f"{stem}.scales" in arrays:
        packed, *beside = (_matrix(arrays[key]) for key in (name, f"{stem}.scales", f"{stem}.biases"))
        return Packed(packed, beside, bits=_bits(packed, _width(path, stem, beside[0].shape[1])))
    return Plain(arrays[name])


def _bits(packed: Any, width: int) -> int:
    """Of a code, rows of so many being whole words."""
    return int(32 * packed.shape[-1] // width)


def _width(path: Path, stem: str, blocks: int) -> int:
    """Weights in a row of a module of an MLX folder: its config says how many a block has."""
    from gemexport.formats.checkpoint import read_config
    from gemexport.formats.gemma.names import canonical_name

    said = read_config(path)["quantization"]
    own = {canonical_name(f"{key}.weight"): value for key, value in said.items() if isinstance(value, dict)}
    return int(blocks * own.get(f"{stem}.weight", said)["group_size"])


def _matrix(array: Any) -> Any:
    return array.reshape(-1, array.shape[-1])


def onnx(path: Path, name: str) -> Place:
    """A tensor of an ONNX folder: the fused operators' layout, or the standard's columns."""
    from gemexport.formats.onnx import CopiedTensor

    return _onnx(_onnx_tensors(path, _changed(path, "*.onnx"))[name], CopiedTensor)


def _changed(folder: Path, pattern: str) -> tuple[int, ...]:
    """When files of a folder that say where a tensor lies were last written: faults change these too."""
    return tuple(file.stat().st_mtime_ns for file in sorted(folder.rglob(pattern)))


@lru_cache(maxsize=1)
def _onnx_tensors(path: Path, changed: tuple[int, ...]) -> Mapping[str, Any]:
    from gemexport.formats.onnx import tensors

    return tensors(path)


@lru_cache(maxsize=1)
def _coreml_constants(path: Path, changed: tuple[int, ...]) -> Mapping[str, Any]:
    from gemexport.formats.coreml import constants
    from gemexport.formats.coreml.package import open_package

    return constants(open_package(path))


def _onnx(tensor: Any, copied: Any) -> Place:
    if isinstance(tensor, copied):
        return Twice([_onnx(tensor.first, copied), _onnx(tensor.second, copied)])
    if isinstance(tensor, Pieces):
        return Below([_onnx(piece.tensor, copied) for piece in tensor.pieces])
    if hasattr(tensor, "packed"):
        return Packed(tensor.packed, [tensor.scales], tensor.transposed, tensor.bits)
    array = tensor.array
    return Plain(array.T, True) if not array.flags.c_contiguous else Plain(array)


def coreml(path: Path, name: str) -> Place:
    """A tensor of a Core ML package: codes or places in a table of numbers, or plain."""
    from gemexport.formats.coreml import stored_name
    from gemexport.formats.coreml.arrays import Palette, ShiftScale, Stored
    from gemexport.formats.coreml.blob import TYPES

    array = _coreml_constants(path, _changed(path, "*.mlmodel"))[stored_name(name)]
    if isinstance(array, ShiftScale):
        data, scale = array.data, array.scale
        data = data.indices if isinstance(data, Palette) else data
        assert isinstance(data, Stored)
        assert isinstance(scale, Stored)
        packed = _blob(data).data.reshape(row_count(array.shape), -1)
        scales = _blob(scale).data.view("<f4" if scale.kind == "fp32" else "<f2")
        return Packed(packed, [scales.reshape(len(packed), -1)], bits=TYPES[data.kind].bits)
    assert isinstance(array, Stored)
    if isinstance(array._source, np.ndarray):
        return Immediate(path, stored_name(name))
    return Plain(_blob(array).data.view("<f4" if array.kind == "fp32" else "<f2").reshape(array.shape))


def _blob(array: Any) -> Any:
    return array._source


class Immediate:
    """A small constant of a Core ML program, which lies in the program itself."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def read(self) -> Numbers:
        _, values = self._open()
        return Numbers(np.array(list(values), np.float32), [])

    def write(self, numbers: Numbers) -> None:
        package, values = self._open()
        values[:] = [float(value) for value in numbers.codes]
        save_package(package)

    def _open(self) -> tuple[Any, Any]:
        from gemexport.formats.coreml.package import open_package

        package = open_package(self._path)
        operation = next(item for item in package.operations if item.outputs and item.outputs[0].name == self._name)
        return package, operation.attributes["val"].immediateValue.tensor.floats.values


def save_package(package: Any) -> None:
    """Write the changed program of an opened Core ML package."""
    (file,) = package.folder.glob("*.mlmodel")
    file.write_bytes(package.model.SerializeToString(deterministic=True))


PLACES: dict[str, Callable[[Path, str], Place]] = {
    "gguf": gguf, "mlx": folder, "onnx": onnx, "coreml": coreml, "compressed-tensors": folder,
}  # fmt: skip
