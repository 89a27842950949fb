"""What a GGUF file has to hold of each tensor of a checkpoint, by variant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from gemexport.exporters.gguf import SMALL, fitted_tensors, keeps_blocks, kquants_of
from gemexport.exporters.gguf.facts import q_norm_factor
from gemexport.exporters.gguf.mix import MIXES
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gguf import FLOATS, file_names, norm_shift
from gemexport.formats.gguf.blocks import BLOCK, Bytes, quantize_q8_0
from gemexport.formats.gguf.layouts import LAYOUTS
from gemexport.formats.promise import Anew, Promise, shifted_back
from gemexport.formats.tensor import DType, Floats, Plain, Rows, Tensor

_ROUNDED: dict[str, DType] = {"BF16": "bf16", "F32": "f32"}  # variants of plain numbers


def promised(checkpoint: Checkpoint, variant: str, *, imatrix: Path | None = None, **_: Any) -> dict[str, Promise]:
    """By canonical name; raises what `export` raises of an importance matrix and of a quantizer that is missing."""
    model = checkpoint.model
    names = file_names(model.family, len(model.decoder.layers))
    kquants = kquants_of(checkpoint, variant, names, imatrix)
    found = {}
    for name, tensor in fitted_tensors(checkpoint, variant)[0].items():
        role = model.specs[name].role
        if not role.has_rows:
            found[name] = Promise(
                shifted_back(tensor, _read_back(*norm_shift(model.family, name, q_norm_factor(model))))
            )
        elif kquants is not None and name in names and names[name] in kquants:
            kind, pack = kquants.choose(names[name])
            found[name] = _anew(tensor, kind, _of_values(pack))
        elif role.kind in SMALL or variant in MIXES:
            found[name] = Promise(Plain(tensor))
        else:
            found[name] = _matrix(tensor, variant)
    return found


def _matrix(tensor: Tensor, variant: str) -> Promise:
    grid = tensor.grid
    if variant in _ROUNDED:
        return Promise(Plain(tensor), plain=_ROUNDED[variant])
    if variant == "Q8_0" and (grid is None or not grid.lossless) and tensor.shape[-1] % BLOCK == 0:
        return _anew(tensor, Type.Q8_0, quantize_q8_0)
    if grid is None or grid.kind == "codebook" or keeps_blocks(tensor, variant):
        return Promise(tensor)
    return Promise(tensor, scales="f16", biased=True)


def _anew(tensor: Tensor, kind: Type, quantize: Callable[[Floats], Bytes]) -> Promise:
    """What a block type makes of a tensor's values; F16 is one that has no codes."""
    if kind in FLOATS:
        return Promise(Plain(tensor), plain=FLOATS[kind])
    layout = LAYOUTS[kind]
    return Promise(Anew(tensor, layout.grid, lambda values: layout.rows(quantize(values))))


def _of_values(pack: Callable[[Rows], Bytes]) -> Callable[[Floats], Bytes]:
    return lambda values: pack(Rows(values))


def _read_back(offset: float, factor: float) -> Callable[[Floats], Floats]:
    """What (value + offset) * factor in float32 reads back as."""

    def back(values: Floats) -> Floats:
        stored = ((values.astype(np.float64) + offset) * factor).astype(np.float32)
        return (stored.astype(np.float64) / factor - offset).astype(np.float32)

    return back
