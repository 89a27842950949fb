"""Writes a GGUF file that llama.cpp runs: every tensor streams from the checkpoint, and grids pass through unchanged.

`Q4_0` is the mixed one: each grid goes into the smallest block type that holds its codes (Q4_0 for a QAT lattice), and
a tensor without a grid keeps the source's dtype. What lies in GGUF's own blocks already keeps them byte for byte.
The K-quants (`gguf_kquants`) are another thing: ggml's quantizer fits them to the values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any, TypeGuard

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from gemexport.exporters.fitting import Answer, Container, fitting
from gemexport.exporters.gguf.facts import (
    metadata,
    problem,
    q_norm_factor,
    rope_frequencies,
)
from gemexport.exporters.gguf.kquants import KQuants
from gemexport.exporters.gguf.mix import MIXES
from gemexport.exporters.result import Export, Progress, ignore
from gemexport.exporters.support import embeddings, experts, require
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.model import Model
from gemexport.formats.gemma.names import PER_LAYER_EMBEDDING
from gemexport.formats.gemma.roles import Kind
from gemexport.formats.gguf import ROPE_FREQUENCIES, StoredTensor, file_names, norm_shift, stack_names
from gemexport.formats.gguf.blocks import (
    BLOCK,
    E2M1,
    WIDE_BLOCK,
    half,
    pack_mxfp4,
    pack_q4_0,
    pack_q4_1,
    pack_q5_0,
    pack_q5_1,
    pack_q8_0,
    pack_tq2_0,
    power_of_two,
    quantize_q8_0,
)
from gemexport.formats.gguf.container import Packed, Value, Writer, nbytes
from gemexport.formats.pieces import Piece, Pieces, whole
from gemexport.formats.promise import Promise
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import atomic
from gemexport.formats.storage.parallel import by_rows
from gemexport.formats.tensor import (
    ITEM_BYTES,
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
SMALL = (Kind.ROUTER, Kind.MIXER)  # linears that are F32 in any file
_PACKED = ("Q4_0", "Q8_0")
_PACKS: dict[Type, Callable[..., NDArray[np.uint8]]] = {  # of codes, f16 scales and perhaps f16 biases
    Type.Q4_0: pack_q4_0,
    Type.Q4_1: pack_q4_1,
    Type.Q5_0: pack_q5_0,
    Type.Q5_1: pack_q5_1,
    Type.Q8_0: pack_q8_0,
    Type.TQ2_0: pack_tq2_0,
}
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
    path, model = Path(path), checkpoint.model
    from gemexport.exporters.gguf.tokenizer import tokenizer  # compiled loops: `supports` is asked without them

    plan = _plan(checkpoint, variant, imatrix, lambda: tokenizer(checkpoint))
    names, kquants, frequencies, notes = plan.names, plan.kquants, plan.frequencies, plan.notes
    with atomic(path) as partial, Writer(partial, plan.metadata, plan.shapes) as out:
        for name, tensor in plan.tensors.items():
            if kquants and names[name] in kquants:
                _stream(out, names[name], *kquants.choose(names[name]), tensor)
            elif model.specs[name].role.kind in SMALL:
                _stream(out, names[name], Type.F32, _f32, tensor)  # as llama.cpp's converter has it in any file
            elif model.specs[name].role.has_rows:
                notes += _write_matrix(out, names[name], tensor, variant)
            else:
                offset, factor = norm_shift(model.family, name, q_norm_factor(model))
                notes += _write_vector(out, names[name], tensor, offset, factor)
            progress(int(np.prod(tensor.shape)) * ITEM_BYTES[tensor.dtype])
        if frequencies is not None:
            out.write(ROPE_FREQUENCIES, Type.F32, frequencies)
        for name, (kind, data) in plan.zeros.items():
            out.write(name, kind, data)
    serves = "llama-server" if model.embedder is None else "llama-server --embeddings"
    return Export(path=path, variant=variant, run=f"{serves} -m {quote(str(path))}", notes=notes, files=[path])


def size(checkpoint: Checkpoint, *, variant: str = VARIANTS[0], imatrix: Path | None = None) -> int:
    """Bytes of what `export` writes; raises as it does. Of each tensor only a row is read."""
    from gemexport.exporters.gguf.tokenizer import packed

    plan = _plan(checkpoint, variant, imatrix, lambda: ({}, []))
    kinds = {plan.names[name]: _kind(name, tensor, plan, variant) for name, tensor in plan.tensors.items()}
    kinds |= {name: kind for name, (kind, _) in plan.zeros.items()}
    head, words = Packed.of(plan.metadata), packed(checkpoint)
    metadata = Packed(head.count + words.count, head.data + words.data, head.alignment)
    return nbytes(metadata, plan.shapes, {**kinds, ROPE_FREQUENCIES: Type.F32})


@dataclass(frozen=True)
class _Plan:
    """A file before its data."""

    model: Model
    names: Mapping[str, str]  # in the file, by ours
    metadata: Mapping[str, Value]
    tensors: Mapping[str, Tensor]  # on grids that the variant holds
    kquants: KQuants | None
    frequencies: NDArray[np.float32] | None  # of RoPE, a tensor of its own
    zeros: Mapping[str, tuple[Type, NDArray[Any]]]  # what llama.cpp asks for and does not read, by its name
    notes: list[str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all the file's tensors, by its names."""
        shapes = {self.names[name]: tensor.shape or (1,) for name, tensor in self.tensors.items()}
        if self.frequencies is not None:
            shapes[ROPE_FREQUENCIES] = self.frequencies.shape
        unread = self.model.family.unread(self.model.decoder)
        return shapes | {self.names[name]: shape for name, shape in unread.items()}


def _plan(
    checkpoint: Checkpoint, variant: str, imatrix: Path | None, words: Callable[[], tuple[dict[str, Value], list[str]]]
) -> _Plan:
    """`words` gives the tokenizer's metadata and notes, once it is known that there is a place for the model."""
    model = checkpoint.model
    require(checkpoint, supports(model, variant), "gguf")
    tokens, notes = words()
    values = metadata(model, checkpoint.name, variant) | tokens
    names = file_names(model.family, len(model.decoder.layers))
    kquants = kquants_of(checkpoint, variant, names, imatrix)
    if kquants:
        values |= kquants.metadata()
        notes += kquants.notes()
    tensors, dropped = fitted_tensors(checkpoint, variant)
    tensors, stacked = _as_laid_out(model, tensors)
    zeros = {names[name]: _zeros(shape, variant) for name, shape in model.family.unread(model.decoder).items()}
    if zeros:
        dropped.append(
            f"{len(zeros)} tensors are zeros ({next(iter(zeros))} …): llama.cpp asks for them, and reads none"
        )
    return _Plan(model, {**names, **stacked}, values, tensors, kquants, rope_frequencies(model), zeros, notes + dropped)


def _as_laid_out(model: Model, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors with stacks in the place of the first matrix of each, and the file's names of these.

    Per-layer embeddings of fewer ids than the vocabulary have the first row for the others, as transformers reads them.
    """
    found, named = dict(tensors), {}
    for stored, ours in stack_names(model.family).items():
        matrices = [tensor for name in ours if (tensor := found.pop(name, None)) is not None]
        if matrices:
            shape = (len(matrices), *matrices[0].shape)
            found[ours[0]] = Pieces(ours[0], shape, [whole(matrix) for matrix in matrices])
            named[ours[0]] = stored
    table, vocabulary = found.get(PER_LAYER_EMBEDDING), model.decoder.vocab_size
    if table is not None and table.shape[0] < vocabulary:
        beyond = [Piece(table, 0, 1)] * (vocabulary - table.shape[0])
        found[PER_LAYER_EMBEDDING] = Pieces(table.name, (vocabulary, table.shape[1]), [whole(table), *beyond])
    return found, named


def _zeros(shape: tuple[int, ...], variant: str) -> tuple[Type, NDArray[Any]]:
    """Nothing, in the smallest type that takes such a shape."""
    if len(shape) < 2 or variant == "F32":
        return Type.F32, np.zeros(shape, np.float32)
    if shape[1] % BLOCK or variant == "BF16":
        return Type.BF16, np.zeros(shape, np.uint16)
    return Type.Q4_0, pack_q4_0(np.zeros(shape, np.int8), np.zeros((shape[0], shape[1] // BLOCK), np.float16))


def _kind(name: str, tensor: Tensor, plan: _Plan, variant: str) -> Type:
    """The type that a tensor is written in, as far as its first row tells: scales that it does not hold show later."""
    role = plan.model.specs[name].role
    if plan.kquants and plan.names[name] in plan.kquants:
        return plan.kquants.choose(plan.names[name])[0]
    if role.kind in SMALL or not role.has_rows:
        return Type.F32
    if keeps_blocks(tensor, variant):
        return tensor.type
    kind, pack, _ = choose(tensor, variant)
    return kind if pack(tensor.rows(0, 1)) is not None else choose(Plain(tensor), variant)[0]


def kquants_of(checkpoint: Checkpoint, variant: str, names: Mapping[str, str], imatrix: Path | None) -> KQuants | None:
    """What a K-quant variant does with the matrices, None for the others; InputError for an imatrix without a use."""
    if variant in MIXES:
        return KQuants(checkpoint, variant, names, imatrix)
    if imatrix is not None:
        problem = f"is for K-quants, and {variant} keeps the checkpoint's own values or codes"
        raise InputError(imatrix, problem, f"choose among the variants {', '.join(MIXES)}")
    return None


def fitted_tensors(checkpoint: Checkpoint, variant: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors as a variant holds them, and notes on those that it does not hold as they are.

    What is in GGUF's blocks needs no container, and may have none: the codes of a K-quant are no use without its nested
    scales.
    """
    if variant not in _PACKED:  # made from the values
        return dict(checkpoint.tensors), []
    blocks = {name: tensor for name, tensor in checkpoint.tensors.items() if keeps_blocks(tensor, variant)}
    others = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in blocks}
    fitted, _, notes = fitting(replace(checkpoint, tensors=others), lambda grid, width: container(grid, width, variant))
    both: Mapping[str, Tensor] = {**blocks, **fitted}
    return {name: both[name] for name in checkpoint.tensors}, notes


def keeps_blocks(tensor: Tensor, variant: str) -> TypeGuard[StoredTensor]:
    """Whether a tensor comes out of a GGUF file in blocks of codes that the variant leaves as they are."""
    return variant == VARIANTS[0] and isinstance(tensor, StoredTensor) and tensor.grid is not None


def _write_vector(out: Writer, name: str, tensor: Tensor, offset: float, factor: float) -> list[str]:
    """A norm or a scalar, always F32, with what llama.cpp expects added and multiplied."""
    values = tensor.numpy().reshape(tensor.shape or (1,))
    stored = ((values.astype(np.float64) + offset) * factor).astype(np.float32)
    out.write(name, Type.F32, stored)
    back = (stored.astype(np.float64) / factor - offset).astype(np.float32)
    lost = int((round_to(back, tensor.dtype) != values).sum())
    return [f"{tensor.name}: {lost} of {values.size} weights are lost in 1 + weight as float32"] if lost else []


def supports(model: Model, variant: str) -> str | None:
    """Why llama.cpp does not run a model; None where it does."""
    # Which type llama-quantize gives experts and linears after the pooling, and in what mix.
    made = experts(model) or embeddings(model) if variant in MIXES else None
    found = made or problem(model)
    return None if found is None else f"llama.cpp cannot run this decoder: {found}"


def container(grid: Grid, width: int, variant: str) -> Answer:
    """What holds a grid in rows of `width` weights in a variant."""
    if variant not in _PACKED:
        return f"the variant {variant} is made from the values"
    if width % BLOCK or grid.block % BLOCK:
        size = f"rows of {width} weights are" if width % BLOCK else f"blocks of {grid.block} weights are"
        return f"{size} no multiple of {BLOCK}"
    kind = _type(grid, variant)
    return kind if isinstance(kind, str) else Container(kind.name, "bf16" if kind == Type.MXFP4 else "f16")


def promises(checkpoint: Checkpoint, variant: str, **options: Any) -> dict[str, Promise]:
    """What a file has to hold of each tensor, by canonical name; raises what `export` raises."""
    from gemexport.exporters.gguf.promised import promised  # which is made of what is here

    return promised(checkpoint, variant, **options)


def _type(grid: Grid, variant: str) -> Type | str:
    """The block type for a grid: the smallest that has a place for every code."""
    if grid.kind == "symmetric":
        if variant == "Q8_0" or grid.bits > 5:
            return Type.Q8_0
        if grid.bits <= 2 and grid.block % WIDE_BLOCK == 0:
            return Type.TQ2_0
        return Type.Q4_0 if grid.bits <= 4 else Type.Q5_0
    if variant == "Q8_0":
        return f"the variant Q8_0 has no place for {grid.bits}-bit codes of the kind {grid.kind}"
    # FP4 with a scale for 32 weights is MXFP4, whose scales are powers of two; `_mxfp4` looks whether they are.
    if grid.kind == "codebook" and grid.levels == E2M1 and grid.scale_dtype == "bf16":
        return Type.MXFP4
    if grid.kind in ("codebook", "vectors") or grid.bits > 5:
        return f"GGUF has no type for {grid.bits}-bit codes of the kind {grid.kind}"
    return Type.Q4_1 if grid.bits <= 4 else Type.Q5_1


def _write_matrix(out: Writer, name: str, tensor: Tensor, variant: str) -> list[str]:
    """A matrix in the type of the variant, or in the source's dtype when that type cannot hold it."""
    if keeps_blocks(tensor, variant):
        for start, stop in slices(tensor):
            out.write(name, tensor.type, tensor.blocks(start, stop))
        return []
    kind, pack, note = choose(tensor, variant)
    notes = [f"{tensor.name} {note}"] if note else []
    if not _stream(out, name, kind, pack, tensor):
        # Scales are seen while they stream past: a second try is cheaper than reading every tensor twice.
        out.restart(name)
        wanted = "power of two" if kind == Type.MXFP4 else "f16 number"
        kind, pack, note = choose(Plain(tensor), variant)
        notes = [f"{tensor.name} is stored as {kind.name}: a scale is no {wanted}"]
        _stream(out, name, kind, pack, tensor)
    return notes


def _stream(out: Writer, name: str, kind: Type, pack: Pack, tensor: Tensor) -> bool:
    """Pack and write a tensor slice by slice, in threads; False as soon as a slice does not fit."""
    for data in by_rows(lambda bounds: pack(tensor.rows(*bounds)), tensor):
        if data is None:
            return False
        out.write(name, kind, data)
    return True


def choose(tensor: Tensor, variant: str) -> tuple[Type, Pack, str]:
    """The type for a matrix in a variant, the function that packs its rows, and a note if there is one to make."""
    grid, width = tensor.grid, tensor.shape[-1]
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
    return kind, _mxfp4(grid) if kind == Type.MXFP4 else _grid(grid, kind, tensor.dtype), ""


def _plain(tensor: Tensor) -> tuple[Type, Pack]:
    packs: dict[DType, Pack] = {"bf16": _bf16("bf16"), "f16": _f16, "f32": _f32}
    return _PLAIN[tensor.dtype], packs[tensor.dtype]


def _grid(grid: Grid, kind: Type, dtype: DType) -> Pack:
    """Pack codes as they are, a wide block's scale repeated for each block of the type.

    Scales and biases that are no f16 numbers are rounded where the tensor has no shorter plain form than f32, else
    refused.
    """
    block = WIDE_BLOCK if kind == Type.TQ2_0 else BLOCK

    def narrow(numbers: Floats) -> NDArray[np.float16] | None:
        repeated = reblock(numbers, grid.block, block)
        assert repeated is not None
        found = half(repeated)
        if found is None and dtype == "f32" and np.abs(repeated).max() <= F16_MAX:
            found = half(round_to(repeated, "f16"))
        return found

    def rows(part: Rows) -> NDArray[np.uint8] | None:
        codes, scales = part.grid()
        stored = [narrow(scales)] if part.shifts is None else [narrow(scales), narrow(biases(grid, part))]
        return None if any(numbers is None for numbers in stored) else _PACKS[kind](codes, *stored)

    return rows


def biases(grid: Grid, part: Rows) -> Floats:
    """What is added to scale * code in each block of a zero-point or affine grid, `[rows, in // block]`."""
    _, scales, shifts = part.shifted()
    return -shifts * scales if grid.kind == "zero-point" else shifts


def _mxfp4(grid: Grid) -> Pack:
    """Pack codes of FP4 as they are, with the exponents of scales that are powers of two."""

    def rows(part: Rows) -> NDArray[np.uint8] | None:
        codes, scales = part.grid()
        repeated = reblock(scales, grid.block, BLOCK)
        assert repeated is not None
        exponents = power_of_two(repeated)
        return None if exponents is None else pack_mxfp4(codes, exponents)

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
