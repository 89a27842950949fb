"""AWQ checkpoints: `qweight` `[in, out / 8]`, `qzeros` `[groups, out / 8]`, `scales` `[groups, out]`, 4 bit.

Eight codes of neighbouring outputs share a word, the even ones in its lower half (awq.modules.linear.gemm, the version
"gemm"). A weight is (code - zero point) * scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from gemexport.formats.checkpoint import Source
from gemexport.formats.gptq import columns, float_scales
from gemexport.formats.modules import Group, Module, check_stated, read_source, settings
from gemexport.formats.quantized import Layout, QuantizedTensor, misshapen
from gemexport.formats.storage.bitpack import Unsigned
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import MappedArray
from gemexport.formats.tensor import Floats, Tensor

BITS, PER_WORD = 4, 8
# Where in a word the code of each of eight outputs is: its bits start here.
SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28], dtype=np.uint32)
VERSION = "gemm"


class Settings(BaseModel):
    """What a reader needs of `quantization_config`; the groups follow from the arrays' shapes."""

    bits: Annotated[int, Field(strict=True, gt=0)] = BITS
    group_size: Group | None = None
    version: str = VERSION


def source(folder: Path, config: dict[str, Any]) -> Source:
    """The decoder in AWQ folder `folder`: quantized modules on the grids of their codes.

    Raises InputError for a broken folder and for a variety of the format that is not known here.
    """
    path = folder / "config.json"
    found = settings(Settings, path, config.get("quantization_config"))
    if found.version.lower() != VERSION or found.bits != BITS:
        problem = f"the AWQ version {found.version} with {found.bits} bits is not known"
        raise InputError(path, problem, f"save the model in the version {VERSION} with {BITS} bits")

    def read(module: Module) -> Tensor | None:
        if "qweight" not in module.arrays:
            return None
        tensor = _read(module)
        check_stated(path, module, {"group_size": found.group_size}, BITS)
        return tensor

    return read_source(folder, config, read)


def _read(module: Module) -> Tensor:
    (out, width), codes, zeros = module.shape, module.need("qweight"), module.need("qzeros")
    scales = float_scales(module)
    groups = scales.entry.shape[0]
    for stored, rows in ((codes, width), (zeros, groups)):
        if stored.entry.shape != (rows, out // PER_WORD) or stored.entry.dtype != "I32" or out % PER_WORD:
            raise misshapen(module.name, stored, module.shape)
    if width % groups:
        raise misshapen(module.name, scales, module.shape)

    def shifts(start: int, stop: int) -> Floats:
        return _unpack(zeros, start, stop).astype(np.float32)

    layout = Layout(
        BITS,
        width // groups,
        lambda start, stop: _unpack(codes, start, stop),
        lambda start, stop: columns(scales, start, stop),
        shifts,
    )
    return QuantizedTensor(module.name, module.shape, layout)


def _unpack(stored: MappedArray, start: int, stop: int) -> Unsigned:
    """Codes of outputs `start` to `stop` as rows `[outputs, in]`, out of words `[in, out / 8]`."""
    first = start // PER_WORD
    packed = stored.array[:, first : -(-stop // PER_WORD)].view("<u4").T  # [words, in]
    spread = ((packed[:, None, :] >> SHIFTS[:, None]) & np.uint32(0xF)).astype(np.uint8)
    found: Unsigned = spread.reshape(-1, packed.shape[1])
    return found[start - first * PER_WORD : stop - first * PER_WORD]
