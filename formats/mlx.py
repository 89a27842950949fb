"""MLX folders: safetensors whose quantized modules hold packed `weight` words with `scales` and, mostly, `biases`.

In the mode "affine" a weight is `scale * c + bias` with an unsigned code c, packed as in bitpack; `group` consecutive
weights of a row share both numbers. The modes "mxfp4", "mxfp8" and "nvfp4" have levels for codes, one byte for a scale
and no biases (mlx.core.quantize).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from gemexport.formats.checkpoint import Source
from gemexport.formats.checkpoint import read_config as read_json
from gemexport.formats.modules import Module, finite_e4m3, read_source
from gemexport.formats.modules import settings as validated
from gemexport.formats.quantized import Layout, QuantizedTensor, floats, is_float
from gemexport.formats.storage.bitpack import Unsigned, unpack, words
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.minifloat import E2M1, E4M3, from_e4m3, from_e8m0
from gemexport.formats.storage.safetensors import FLOAT_DTYPES, MappedArray
from gemexport.formats.tensor import Floats, Tensor

GROUPS = (128, 64, 32)  # what MLX's kernels take, widest first: fewer scales for the same grid
BITS = (2, 3, 4, 5, 6, 8)


class Settings(BaseModel):
    """What config.json says of quantized modules; a folder of another tool may leave it to the arrays."""

    bits: Literal[2, 3, 4, 5, 6, 8] | None = None
    group_size: Literal[16, 32, 64, 128] | None = None


@dataclass(frozen=True)
class FloatMode:
    """A mode whose codes are small floats."""

    name: str
    bits: int
    group: int
    levels: tuple[float, ...]
    e8m0: bool  # scales are powers of two, else E4M3 numbers


FLOAT_MODES = (
    FloatMode("mxfp4", 4, 32, E2M1, e8m0=True),
    FloatMode("mxfp8", 8, 32, E4M3, e8m0=True),
    FloatMode("nvfp4", 4, 16, E2M1, e8m0=False),
)
MODES = ("affine", *(mode.name for mode in FLOAT_MODES))


def group_for(block: int, width: int) -> int | None:
    """The widest MLX group that a grid of this block fits unchanged, in rows of `width`; None when none does."""
    return next((group for group in GROUPS if block % group == 0 and width % group == 0), None)


def tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of the decoder in MLX folder `path` under its canonical name, mapped; also of other tools' folders.

    Raises InputError when a file is broken, a tensor is missing, or the quantization is none that is known here.
    """
    return dict(source(Path(path), read_config(Path(path))).tensors)


def source(folder: Path, config: dict[str, Any]) -> Source:
    """The decoder in MLX folder `folder`: quantized modules on the grids of their codes."""
    stated = {(item.bits, item.group_size) for item in _settings(folder, config)}

    def read(module: Module) -> Tensor | None:
        tensor = _read(module)
        if tensor is not None and not stated & {tensor.packing, (None, None)}:
            bits, group = tensor.packing
            problem = (
                f"{module.name} has {bits} bits in groups of {group}, of which the quantization settings do not tell"
            )
            raise InputError(folder / "config.json", problem, "use the config.json that came with the model")
        return tensor

    return read_source(folder, config, read)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an MLX folder; InputError when there is none, or its quantization mode is not known here."""
    config = read_json(folder)
    _settings(folder, config)
    return config


def _settings(folder: Path, config: dict[str, Any]) -> list[Settings]:
    """The settings of modules in general, and of those that have their own."""
    settings = config.get("quantization") or config.get("quantization_config") or {}
    path, remedy = folder / "config.json", "give an MLX folder as mlx_lm saves it"
    if not isinstance(settings, dict):
        raise InputError(path, "the quantization settings are no JSON object", remedy)
    modules = [item for item in settings.values() if isinstance(item, dict)]
    modes = [item.get("mode", "affine") for item in (settings, *modules)]
    unknown = sorted({str(mode) for mode in modes if mode not in MODES})
    if unknown:
        problem = f"the quantization mode {', '.join(unknown)} is not known"
        raise InputError(path, problem, f"give a folder in the mode {' or '.join(MODES)}")
    return [validated(Settings, path, item) for item in (settings, *modules)]


def _read(module: Module) -> QuantizedTensor | None:
    """A quantized module, known by its words; what they hold follows from the arrays' shapes, as in mlx_lm."""
    weight = module.arrays.get("weight")
    if weight is None or is_float(weight):
        return None
    scales, biases = module.arrays.get("scales"), module.arrays.get("biases")
    if scales is None or weight.entry.dtype != "U32":
        raise module.wrong(f"is {weight.entry.dtype} without scales", "give a folder as mlx_lm saves it")
    *leading, width = module.shape
    row, groups = weight.entry.shape[-1:], scales.entry.shape[-1:]
    bits = row[0] * 32 // width if row else 0
    whole = (
        bits in BITS
        and weight.entry.shape == (*leading, words(width, bits))
        and scales.entry.shape == (*leading, *groups)
        and groups[0] > 0
        and width % groups[0] == 0
        and (biases is None or biases.entry.shape == scales.entry.shape)
    )
    if not whole:
        parts = [list(part.entry.shape) for part in (weight, scales, biases) if part is not None]
        problem = f"has words, scales and biases of {parts} where config.json says {list(module.shape)}"
        raise module.wrong(problem)
    layout = _layout(module, bits, width // groups[0], weight, scales, biases)
    return QuantizedTensor(module.name, module.shape, layout)


def _layout(
    module: Module, bits: int, group: int, weight: MappedArray, scales: MappedArray, biases: MappedArray | None
) -> Layout:
    width = module.shape[-1]

    def codes(start: int, stop: int) -> Unsigned:
        return unpack(weight.matrix[start:stop], bits, width)

    if biases is not None:
        if not {scales.entry.dtype, biases.entry.dtype} <= FLOAT_DTYPES.keys():
            raise module.wrong(f"has scales of {scales.entry.dtype} and biases of {biases.entry.dtype}")
        stored = biases  # a name that is never None
        return Layout(
            bits,
            group,
            codes,
            lambda start, stop: floats(scales, start, stop),
            lambda start, stop: floats(stored, start, stop),
            "affine",
            evaluated_in=FLOAT_DTYPES[scales.entry.dtype],
        )
    mode = next((mode for mode in FLOAT_MODES if (mode.bits, mode.group) == (bits, group)), None)
    if mode is None or scales.entry.dtype != "U8":
        problem = f"has {bits}-bit codes in groups of {group}, {scales.entry.dtype} scales and no biases"
        raise module.wrong(problem, f"give a folder in the mode {' or '.join(MODES)}")

    def numbers(start: int, stop: int) -> Floats:
        stored = scales.matrix[start:stop]
        return from_e8m0(stored) if mode.e8m0 else from_e4m3(stored)

    return Layout(
        bits,
        group,
        finite_e4m3(module, codes) if mode.levels is E4M3 else codes,
        numbers,
        kind="codebook",
        levels=mode.levels,
    )
