"""Writes a GGUF file that llama.cpp runs: every tensor streams from the checkpoint, and grids pass through unchanged.

`Q4_0` is the mixed one: a 4-bit or 2-bit grid becomes Q4_0 with the grid's own scales, an 8-bit grid Q8_0, and a tensor
without a grid keeps the source's dtype. Where a block type cannot hold a grid, the tensor keeps the source's dtype.
The K-quants (`gguf_kquants`) are another thing: ggml's quantizer fits them to the values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from gemexport.exporters.fitting import Answer, Container, fitting
from gemexport.exporters.gguf_kquants import KQuants
from gemexport.exporters.gguf_metadata import (
    check,
    metadata,
    q_norm_factor,
    rope_frequencies,
)
from gemexport.exporters.gguf_mix import MIXES
from gemexport.exporters.gguf_tokenizer import tokenizer
from gemexport.exporters.result import Export, Progress, ignore
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.errors import InputError
from gemexport.formats.files import atomic
from gemexport.formats.gguf import file_names, norm_shift
from gemexport.formats.gguf_blocks import BLOCK, half, pack_q4_0, pack_q8_0, quantize_q8_0
from gemexport.formats.gguf_config import ROPE_FREQUENCIES
from gemexport.formats.gguf_container import Writer
from gemexport.formats.parallel import ordered
from gemexport.formats.tensor import (
    ITEM_BYTES,
    Codes,
    DType,
    Floats,
    Grid,
    Plain,
    Rows,
    Tensor,
    reblock,
    round_to,
    slices,
    to_bf16,
)

VARIANTS: tuple[str, ...] = ("Q4_0", "Q8_0", "BF16", "F32", *MIXES)

Pack = Callable[[Rows], NDArray | None]  # None: these rows do not fit the type

F16_MAX = 65504.0
_PACKED = ("Q4_0", "Q8_0")
_PACKS = {Type.Q4_0: pack_q4_0, Type.Q8_0: pack_q8_0}
_PLAIN: dict[DType, Type] = {"bf16": Type.BF16, "f16": Type.F16, "f32": Type.F32}


def export(
    checkpoint: Checkpoint,
    path: Path,
    *,
    variant: str = VARIANTS[0],
    imatrix: Path | None = None,
    progress: Progress = ignore,
) -> Export:
    """Write `checkpoint` to the file `path`; the notes name every tensor that the format could not hold as it is.

    `imatrix` is a file of llama-imatrix, for K-quants. Raises InputError for a decoder or a tokenizer that llama.cpp
    cannot run, for an importance matrix that does not fit, and for a path that cannot be written.
    """
    if variant not in VARIANTS:
        raise ValueError(f"{variant}: GGUF has the variants {', '.join(VARIANTS)}")
    path = Path(path)
    decoder = checkpoint.architecture
    check(decoder, checkpoint.path)
    tokens, notes = tokenizer(checkpoint)
    values = metadata(decoder, checkpoint.name, variant) | tokens
    names = file_names(decoder.family, len(decoder.layers))
    kquants = _kquants(checkpoint, variant, names, imatrix)
    if kquants:
        values |= kquants.metadata()
        notes += kquants.notes()
    frequencies = rope_frequencies(decoder)
    tensors: Mapping[str, Tensor] = checkpoint.tensors
    if variant in _PACKED:
        tensors, _, dropped = fitting(checkpoint, lambda grid, width: container(grid, width, variant))
        notes += dropped
    shapes = {names[name]: tensor.shape or (1,) for name, tensor in tensors.items()}
    if frequencies is not None:
        shapes[ROPE_FREQUENCIES] = frequencies.shape
    with atomic(path) as partial, Writer(partial, values, shapes) as out:
        for name, tensor in tensors.items():
            if kquants and names[name] in kquants:
                _stream(out, names[name], *kquants.choose(names[name]), tensor)
            elif len(tensor.shape) == 2:
                notes += _write_matrix(out, names[name], tensor, variant)
            else:
                offset, factor = norm_shift(decoder.family, name, q_norm_factor(decoder))
                notes += _write_vector(out, names[name], tensor, offset, factor)
            progress(int(np.prod(tensor.shape)) * ITEM_BYTES[tensor.dtype])
        if frequencies is not None:
            out.write(ROPE_FREQUENCIES, Type.F32, frequencies)
    return Export(path=path, variant=variant, run=f"llama-server -m {quote(str(path))}", notes=notes, files=[path])


def _kquants(checkpoint: Checkpoint, variant: str, names: Mapping[str, str], imatrix: Path | None) -> KQuants | None:
    """What a K-quant variant does with the matrices, None for the others; InputError for an imatrix without a use."""
    if variant in MIXES:
        return KQuants(checkpoint, variant, names, imatrix)
    if imatrix is not None:
        problem = f"is for K-quants, and {variant} keeps the checkpoint's own values or codes"
        raise InputError(imatrix, problem, f"choose among the variants {', '.join(MIXES)}")
    return None


def _write_vector(out: Writer, name: str, tensor: Tensor, offset: float, factor: float) -> list[str]:
    """A norm or a scalar, always F32, with what llama.cpp expects added and multiplied."""
    values = tensor.numpy().reshape(tensor.shape or (1,))
    stored = ((values.astype(np.float64) + offset) * factor).astype(np.float32)
    out.write(name, Type.F32, stored)
    back = (stored.astype(np.float64) / factor - offset).astype(np.float32)
    lost = int((round_to(back, tensor.dtype) != values).sum())
    return [f"{tensor.name}: {lost} of {values.size} weights are lost in 1 + weight as float32"] if lost else []


def container(grid: Grid, width: int, variant: str) -> Answer:
    """What holds a grid in rows of `width` weights in a variant."""
    if variant not in _PACKED:
        return f"the variant {variant} is made from the values"
    if width % BLOCK or grid.block % BLOCK:
        size = f"rows of {width} weights are" if width % BLOCK else f"blocks of {grid.block} weights are"
        return f"{size} no multiple of {BLOCK}"
    kind = _type(grid, variant)
    return kind if isinstance(kind, str) else Container(kind.name, "f16")


def _type(grid: Grid, variant: str) -> Type | str:
    """The block type for a grid."""
    if grid.kind != "symmetric":
        return f"GGUF has no type for {grid.bits}-bit codes of the kind {grid.kind}"
    return Type.Q4_0 if grid.bits <= 4 and variant == "Q4_0" else Type.Q8_0


def _write_matrix(out: Writer, name: str, tensor: Tensor, variant: str) -> list[str]:
    """A 2-D tensor in the type of the variant, or in the source's dtype when that type cannot hold it."""
    kind, pack, note = choose(tensor, variant)
    notes = [f"{tensor.name} {note}"] if note else []
    if not _stream(out, name, kind, pack, tensor):
        # Scales are seen while they stream past: a second try is cheaper than reading every tensor twice.
        out.restart(name)
        kind, pack, note = choose(Plain(tensor), variant)
        notes = [f"{tensor.name} is stored as {kind.name}: a scale is no f16 number"]
        _stream(out, name, kind, pack, tensor)
    return notes


def _stream(out: Writer, name: str, kind: Type, pack: Pack, tensor: Tensor) -> bool:
    """Pack and write a tensor slice by slice, in threads; False as soon as a slice does not fit."""
    for data in ordered(lambda bounds: pack(tensor.rows(*bounds)), slices(tensor)):
        if data is None:
            return False
        out.write(name, kind, data)
    return True


def choose(tensor: Tensor, variant: str) -> tuple[Type, Pack, str]:
    """The type for a 2-D tensor in a variant, the function that packs its rows, and a note if there is one to make."""
    grid, width = tensor.grid, tensor.shape[1]
    if variant == "F32":
        return Type.F32, _f32, ""
    if variant == "BF16":
        return Type.BF16, _bf16(tensor.dtype), "" if tensor.dtype == "bf16" else f"was rounded from {tensor.dtype}"
    if variant in MIXES:  # what llama.cpp does not quantize
        return *_plain(tensor), ""
    if variant == "Q8_0" and (grid is None or not grid.lossless):
        if width % BLOCK:
            return *_plain(tensor), f"stays {tensor.dtype}: rows of {width} weights are no multiple of {BLOCK}"
        return Type.Q8_0, _nearest_q8_0, ""
    if grid is None:
        return *_plain(tensor), ""
    kind = _type(grid, variant)
    assert not isinstance(kind, str)  # `fitting` left grids that have a type
    return kind, _grid(grid, _PACKS[kind], tensor.dtype), ""


def _plain(tensor: Tensor) -> tuple[Type, Pack]:
    packs: dict[DType, Pack] = {"bf16": _bf16("bf16"), "f16": _f16, "f32": _f32}
    return _PLAIN[tensor.dtype], packs[tensor.dtype]


def _grid(grid: Grid, pack: Callable[[Codes, NDArray[np.float16]], NDArray[np.uint8]], dtype: DType) -> Pack:
    """Pack codes as they are, a wide block's scale repeated for each 32 weights.

    Scales that are no f16 numbers are rounded where the tensor has no shorter plain form than f32, else refused.
    """

    def rows(part: Rows) -> NDArray[np.uint8] | None:
        codes, scales = part.grid()
        repeated = reblock(scales, grid.block, BLOCK)
        assert repeated is not None
        narrow = half(repeated)
        if narrow is None and dtype == "f32" and np.abs(repeated).max() <= F16_MAX:
            narrow = half(round_to(repeated, "f16"))
        return None if narrow is None else pack(codes, narrow)

    return rows


def _bf16(source: DType) -> Pack:
    # Values that come from bf16 need no rounding: their low half is zero.
    if source == "bf16":
        return lambda part: (part.values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return lambda part: to_bf16(part.values)


def _f16(part: Rows) -> NDArray[np.float16]:
    return part.values.astype("<f2")


def _f32(part: Rows) -> Floats:
    return part.values.astype("<f4", copy=False)


def _nearest_q8_0(part: Rows) -> NDArray[np.uint8]:
    return quantize_q8_0(part.values)
