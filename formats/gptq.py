"""GPTQ checkpoints: `qweight` `[in * bits / 32, out]`, `qzeros` `[groups, out * bits / 32]`, `scales` `[groups, out]`.

Codes are packed down the columns of `qweight`, zero points along the rows of `qzeros`, both as in bitpack, and `g_idx`
names the group of each column (AutoGPTQ's qlinear modules; gptqmodel.nn_modules.qlinear). The first version of the
format stores every zero point less one, `gptq_v2` as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from gemexport.formats.checkpoint import Source
from gemexport.formats.modules import Group, Module, apart, check_stated, read_source, reordered_note, settings
from gemexport.formats.quantized import Layout, QuantizedTensor, misshapen, runs
from gemexport.formats.storage.bitpack import Unsigned, unpack, words
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import FLOAT_DTYPES, MappedArray
from gemexport.formats.tensor import Floats, Tensor, from_bf16

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"


class Settings(BaseModel):
    """What a reader needs of `quantization_config`; bits and groups follow from the arrays' shapes."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Group | None = None
    dynamic: dict[str, Any] | None = None  # other settings for some modules
    checkpoint_format: str | None = None
    pack_dtype: str = "int32"


def source(folder: Path, config: dict[str, Any]) -> Source:
    """The decoder in GPTQ folder `folder`: quantized modules on the grids of their codes.

    Columns in activation order (`desc_act`) share a scale with others far away, so such a tensor has blocks of one.
    Raises InputError for a broken folder and for a variety of the format that is not known here.
    """
    path = folder / "config.json"
    found = settings(Settings, path, config.get("quantization_config"))
    version = found.checkpoint_format or V1
    if version not in (V1, V2) or found.pack_dtype != "int32":
        problem = f"the GPTQ format {version}, packed in {found.pack_dtype}, is not known"
        raise InputError(path, problem, f"save the model in the format {V1} or {V2}, packed in int32")
    reordered = 0

    def read(module: Module) -> Tensor | None:
        nonlocal reordered
        if "qweight" not in module.arrays:
            return None
        layout = _layout(module, found.bits, version)
        if not found.dynamic:
            check_stated(path, module, {"bits": found.bits, "group_size": found.group_size}, layout.bits)
        reordered += apart(layout, module)
        return QuantizedTensor(module.name, module.shape, layout)

    result = read_source(folder, config, read)
    return Source(result.tensors, result.left_out, tuple(reordered_note(reordered)))


def _layout(module: Module, usual: int, version: str) -> Layout:
    (out, width), codes, zeros, scales = (
        module.shape,
        module.need("qweight"),
        module.need("qzeros"),
        float_scales(module),
    )
    fitting = [bits for bits in BITS if codes.entry.shape == (words(width, bits), out)]
    if not fitting or codes.entry.dtype != "I32":
        raise misshapen(module.name, codes, module.shape)
    bits = usual if usual in fitting else fitting[0]
    groups = scales.entry.shape[0]
    if zeros.entry.shape != (groups, words(out, bits)) or zeros.entry.dtype != "I32":
        raise misshapen(module.name, zeros, module.shape)
    block, order = _groups(module, groups)

    def shifts(start: int, stop: int) -> Floats:
        first = start // 32 * 32  # 32 codes end at a word's end, whatever their width
        packed = zeros.array[:, first * bits // 32 : words(stop, bits)].view("<u4")
        return _zero_points(packed, bits, stop - first, version)[:, start - first :].T[:, order].astype(np.float32)

    return Layout(
        bits,
        block,
        lambda start, stop: unpack(codes.array[:, start:stop].T, bits, width),
        lambda start, stop: columns(scales, start, stop)[:, order],
        shifts,
    )


def _zero_points(packed: NDArray[np.uint32], bits: int, width: int, version: str) -> Unsigned:
    """Zero points `[groups, width]` out of words of the version."""
    if version == V2:
        return unpack(packed, bits, width)
    if 32 % bits:
        return (unpack(packed, bits, width) + np.uint8(1)) & np.uint8((1 << bits) - 1)
    # gptqmodel adds one to all of a word at once, so a zero point of 0, stored as -1, borrows from the next.
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return unpack(packed + ones, bits, width)


def _groups(module: Module, groups: int) -> tuple[int, NDArray[np.intp]]:
    """The block of columns that share a group, and the group of each such block."""
    width, stored = module.shape[1], module.arrays.get("g_idx")
    if stored is None:
        if width % groups:
            raise misshapen(module.name, module.need("scales"), module.shape)
        return width // groups, np.arange(groups)
    found = runs(stored.array, groups) if stored.entry.shape == (width,) and stored.entry.dtype == "I32" else None
    if found is None:
        raise misshapen(module.name, stored, module.shape)
    return found


def float_scales(module: Module) -> MappedArray:
    """The scales `[groups, out]` of a module; InputError when they are missing or are no floats of that shape."""
    scales = module.need("scales")
    shape = scales.entry.shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] != module.shape[0] or scales.entry.dtype not in FLOAT_DTYPES:
        raise misshapen(module.name, scales, module.shape)
    return scales


def columns(stored: MappedArray, start: int, stop: int) -> Floats:
    """Columns of an array of floats, as float32 rows."""
    part = np.ascontiguousarray(stored.array[:, start:stop].T)
    return from_bf16(part) if stored.entry.dtype == "BF16" else part.astype(np.float32)
