"""MLX folders: safetensors whose quantized modules hold packed `weight` words with `scales` and `biases`.

A weight is `scale * c + bias` with an unsigned code c, packed as in bitpack; `group` consecutive weights of a row
share both numbers (mlx.core.quantize, mode "affine"). A signed grid `scale * q` is the special case with
c = q + 2**(bits - 1) and bias = -2**(bits - 1) * scale.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gemexport.formats.architecture import architecture
from gemexport.formats.bitpack import signed, unpack, zero_code
from gemexport.formats.checkpoint import canonical_name
from gemexport.formats.errors import InputError
from gemexport.formats.safetensors import FLOAT_DTYPES, MappedArray, MappedTensor, read_folder
from gemexport.formats.tensor import DType, Floats, Grid, Rows, Tensor, expand, from_bf16, narrowest

GROUPS = (128, 64, 32)  # what MLX's kernels take, widest first: fewer scales for the same grid
SYMMETRIC_BITS = (2, 4, 8)
BITS = (2, 3, 4, 5, 6, 8)


def group_for(block: int, width: int) -> int | None:
    """The widest MLX group that a grid of this block fits unchanged, in rows of `width`; None when none does."""
    return next((group for group in GROUPS if block % group == 0 and width % group == 0), None)


class QuantizedTensor:
    """A quantized module's weight `[out, in]`, read from the mapped words, scales and biases."""

    def __init__(
        self, name: str, shape: tuple[int, ...], words: MappedArray, scales: MappedArray, biases: MappedArray
    ) -> None:
        self.name = name
        self.shape = shape
        self._words, self._scales, self._biases = words, scales, biases
        self.dtype: DType = FLOAT_DTYPES[scales.entry.dtype]
        self.group = shape[1] // scales.entry.shape[1]
        self.bits = words.entry.shape[1] * 32 // shape[1]

    @cached_property
    def grid(self) -> Grid | None:
        """The signed grid, when every bias is that of one; the affine grids of other tools have none."""
        if self.bits not in SYMMETRIC_BITS:
            return None
        scale_dtype: DType = "bf16"
        order: tuple[DType, ...] = ("bf16", "f16", "f32")
        step = max(1, (1 << 20) // self._scales.entry.shape[1])
        for start in range(0, self.shape[0], step):
            scales, biases = self._affine(start, start + step)
            if not np.array_equal(biases, -zero_code(self.bits) * scales):
                return None
            scale_dtype = max(scale_dtype, narrowest(scales), key=order.index)
        return Grid(self.bits, self.group, scale_dtype, lossless=True)

    def rows(self, start: int, stop: int) -> Rows:
        """Rows with scale * c + bias evaluated without rounding on the way; codes and scales of a signed grid."""
        scales, biases = self._affine(start, stop)
        unsigned = unpack(self._words.array[start:stop], self.bits, self.shape[1])
        if self.grid is not None:
            codes = signed(unsigned, self.bits)
            return Rows(codes * expand(scales, self.group), codes, scales)
        values = unsigned.reshape(*scales.shape, self.group) * scales[..., None].astype(np.float64)
        exact = values + biases[..., None].astype(np.float64)
        return Rows(exact.reshape(unsigned.shape).astype(np.float32))

    def numpy(self) -> Floats:
        return self.rows(0, self.shape[0]).values

    def _affine(self, start: int, stop: int) -> tuple[Floats, Floats]:
        return _floats(self._scales, start, stop), _floats(self._biases, start, stop)


def _floats(stored: MappedArray, start: int, stop: int) -> Floats:
    array = stored.array[start:stop]
    return from_bf16(array) if stored.entry.dtype == "BF16" else np.asarray(array, dtype=np.float32)


def tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of the decoder in MLX folder `path` under its canonical name, mapped; also of other tools' folders.

    Raises InputError when a file is broken, a tensor is missing, or the quantization is none that is known here.
    """
    folder = Path(path)
    config = read_config(folder)
    stored = {canonical_name(name): array for name, array in read_folder(folder).items()}
    shapes = architecture(config, folder / "config.json").tensor_shapes()
    return {name: _tensor(folder, name, shape, stored) for name, shape in shapes.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an MLX folder; InputError when there is none, or its quantization mode is not known here."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        quantization = config.get("quantization") or {}
        modes = {quantization.get("mode", "affine")}
        modes |= {item.get("mode", "affine") for item in quantization.values() if isinstance(item, dict)}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            path, f"cannot be read as a config ({error})", "give an MLX folder as mlx_lm saves it"
        ) from error
    if modes != {"affine"}:
        unknown = ", ".join(sorted(modes - {"affine"}))
        raise InputError(path, f"the quantization mode {unknown} is not known", "give a folder in the mode affine")
    return dict(config)


def _tensor(folder: Path, name: str, shape: tuple[int, ...], stored: dict[str, MappedArray]) -> Tensor:
    module = name.removesuffix(".weight")
    weight = stored.get(name)
    if weight is None:
        raise InputError(folder, f"the tensor {name} is missing", "export or convert the model again")
    if weight.entry.dtype in FLOAT_DTYPES:
        if weight.entry.shape != shape and not (shape == (1,) and weight.entry.shape == ()):
            problem = f"tensor {name} has the shape {list(weight.entry.shape)} where config.json says {list(shape)}"
            raise InputError(weight.path, problem, "use the config.json that came with the model")
        return MappedTensor(weight, name)
    scales, biases = stored.get(f"{module}.scales"), stored.get(f"{module}.biases")
    if scales is None or biases is None or weight.entry.dtype != "U32":
        problem = f"tensor {name} is {weight.entry.dtype} without scales and biases"
        raise InputError(weight.path, problem, "give a folder in MLX's affine quantization")
    _check_packed(name, shape, weight, scales, biases)
    return QuantizedTensor(name, shape, weight, scales, biases)


def _check_packed(
    name: str, shape: tuple[int, ...], weight: MappedArray, scales: MappedArray, biases: MappedArray
) -> None:
    """Raise InputError unless words, scales and biases add up to a matrix of `shape`."""
    (rows, words), groups, width = weight.entry.shape, scales.entry.shape[-1], shape[-1]
    whole = (
        len(shape) == 2
        and scales.entry.shape == biases.entry.shape == (shape[0], groups)
        and scales.entry.dtype == biases.entry.dtype
        and scales.entry.dtype in FLOAT_DTYPES
        and rows == shape[0]
        and (words * 32) % width == 0
        and words * 32 // width in BITS
        and groups > 0
        and width % groups == 0
    )
    if not whole:
        parts = [list(part.entry.shape) for part in (weight, scales, biases)]
        problem = f"tensor {name} has words, scales and biases of {parts} where config.json says {list(shape)}"
        raise InputError(weight.path, problem, "use the config.json that came with the model")
