"""compressed-tensors folders: Hugging Face checkpoints whose quantized modules hold packed codes and scales.

In the format `pack-quantized` a module has `weight_packed` (int32 words as in bitpack), `weight_scale`
`[out, in / group]` and `weight_shape`; a weight is code * scale, or (code - zero point) * scale in files of other tools
(compressed_tensors.compressors.pack_quantized). `int-quantized` keeps int8 codes in `weight`.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.architecture import architecture
from gemexport.formats.bitpack import signed, unpack, words
from gemexport.formats.checkpoint import canonical_name
from gemexport.formats.errors import InputError
from gemexport.formats.safetensors import FLOAT_DTYPES, MappedArray, MappedTensor, read_folder
from gemexport.formats.tensor import (
    Codes,
    DType,
    Floats,
    Grid,
    Rows,
    Tensor,
    expand,
    from_bf16,
    narrowest,
    slices,
)

FORMATS = ("pack-quantized", "int-quantized")
SCALE_ROWS = 1 << 16


class PackedTensor:
    """A module's weight `[out, in]`, read from mapped codes and scales."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        codes: MappedArray,
        scales: MappedArray,
        zero_points: MappedArray | None = None,
    ) -> None:
        self.name, self.shape = name, shape
        self._codes, self._scales = codes, scales
        self.dtype: DType = FLOAT_DTYPES[scales.entry.dtype]
        self.block = shape[1] // scales.entry.shape[1]
        self.bits = 8 if codes.entry.dtype == "I8" else _bits(codes.entry.shape[1], shape[1])
        self._zero_points = None if zero_points is None else self._unpack_zero_points(zero_points)

    def _unpack_zero_points(self, stored: MappedArray) -> Codes:
        """Zero points `[out, in / group]`: packed down the columns, unlike the weights."""
        packed = np.ascontiguousarray(stored.array.T).view("<u4")
        return np.ascontiguousarray(signed(unpack(packed, self.bits, self.shape[0]), self.bits).T)

    @cached_property
    def grid(self) -> Grid | None:
        """The signed grid; none where zero points shift it."""
        if self._zero_points is not None:
            return None
        order: tuple[DType, ...] = ("bf16", "f16", "f32")
        found: DType = "bf16"
        for start in range(0, self.shape[0], SCALE_ROWS):
            found = max(found, narrowest(self._scale(start, start + SCALE_ROWS)), key=order.index)
        return Grid(self.bits, self.block, found, lossless=True)

    def rows(self, start: int, stop: int) -> Rows:
        """Rows with code * scale evaluated without rounding on the way."""
        codes, scales = self._code(start, stop), self._scale(start, stop)
        if self._zero_points is None:
            return Rows(codes * expand(scales, self.block), codes, scales)
        shifted = codes.astype(np.int16) - np.repeat(self._zero_points[start:stop], self.block, axis=1)
        return Rows(shifted * expand(scales, self.block))

    def numpy(self) -> Floats:
        parts = [self.rows(start, stop).values for start, stop in slices(self)]
        return np.concatenate(parts)

    def _code(self, start: int, stop: int) -> Codes:
        stored: NDArray[Any] = self._codes.array[start:stop]
        if self._codes.entry.dtype == "I8":
            return np.asarray(stored)
        return signed(unpack(stored.view("<u4"), self.bits, self.shape[1]), self.bits)

    def _scale(self, start: int, stop: int) -> Floats:
        stored = self._scales.array[start:stop]
        return from_bf16(stored) if self.dtype == "bf16" else np.asarray(stored, dtype=np.float32)


def _bits(row: int, width: int) -> int:
    """Bits a code when `width` codes take `row` words."""
    return next((bits for bits in range(1, 9) if words(width, bits) == row), 0)


def tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of the decoder in folder `path` under its canonical name, mapped; also of other tools' folders.

    Raises InputError when a file is broken, a tensor is missing, or the quantization is none that is known here.
    """
    folder = Path(path)
    config = read_config(folder)
    stored = {canonical_name(name): array for name, array in read_folder(folder).items()}
    shapes = architecture(config, folder / "config.json").tensor_shapes()
    return {name: _tensor(folder, name, shape, stored) for name, shape in shapes.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; InputError when there is none, or its quantization format is not known here."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        quantization = config.get("quantization_config") or {}
        groups = quantization.get("config_groups") or {}
        formats = {group.get("format") or quantization.get("format") for group in groups.values()}
    except (OSError, ValueError, AttributeError) as error:
        problem, remedy = f"cannot be read as a config ({error})", "give a folder in Hugging Face layout"
        raise InputError(path, problem, remedy) from error
    unknown = sorted(map(str, formats - set(FORMATS)))
    if unknown:
        remedy = f"give a folder in the format {' or '.join(FORMATS)}"
        raise InputError(path, f"the format {', '.join(unknown)} of compressed-tensors is not known", remedy)
    return dict(config)


def _tensor(folder: Path, name: str, shape: tuple[int, ...], stored: dict[str, MappedArray]) -> Tensor:
    module = name.removesuffix(".weight")
    packed, scales = stored.get(f"{module}.weight_packed"), stored.get(f"{module}.weight_scale")
    plain = stored.get(name)
    if packed is None and plain is not None and plain.entry.dtype in FLOAT_DTYPES:
        if plain.entry.shape != shape and not (shape == (1,) and plain.entry.shape == ()):
            raise _misshapen(name, plain, shape)
        return MappedTensor(plain, name)
    codes = packed or plain
    if codes is None:
        raise InputError(folder, f"the tensor {name} is missing", "export or download the model again")
    if scales is None or codes.entry.dtype not in ("I32", "I8") or scales.entry.dtype not in FLOAT_DTYPES:
        problem = f"tensor {name} is {codes.entry.dtype} without scales"
        raise InputError(codes.path, problem, f"give a folder in the format {' or '.join(FORMATS)}")
    if f"{module}.weight_g_idx" in stored:
        raise InputError(codes.path, f"tensor {name} has its columns reordered (g_idx)", "use another scheme")
    rows, row = codes.entry.shape[0], codes.entry.shape[-1]
    groups = scales.entry.shape[-1] if len(scales.entry.shape) == 2 else 0
    whole = (
        len(shape) == 2
        and len(codes.entry.shape) == 2
        and rows == shape[0]
        and (row == shape[1] if codes.entry.dtype == "I8" else _bits(row, shape[1]) > 0)
        and groups > 0
        and scales.entry.shape == (shape[0], groups)
        and shape[1] % groups == 0
    )
    if not whole:
        raise _misshapen(name, codes, shape)
    return PackedTensor(name, shape, codes, scales, stored.get(f"{module}.weight_zero_point"))


def _misshapen(name: str, found: MappedArray, shape: tuple[int, ...]) -> InputError:
    problem = f"tensor {name} is stored as {list(found.entry.shape)}, which does not make {list(shape)}"
    return InputError(found.path, problem, "use the config.json that came with the model")
