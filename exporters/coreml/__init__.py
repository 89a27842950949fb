"""Writes a checkpoint as a Core ML program (iOS 18, macOS 15): stateful KV cache, int4 blocks, on any machine.

Nothing is traced: the decoder's description is spelled in MIL, and weights stream from the source into the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import numpy as np

from gemexport.exporters.coreml.forms import code_type, held
from gemexport.exporters.coreml.weights import Sources
from gemexport.exporters.fitting import Answer, Container, fitting, left_out
from gemexport.exporters.fitting import promises as fitted
from gemexport.exporters.graphs.decoder import logits
from gemexport.exporters.result import Export, Progress, ignore
from gemexport.exporters.support import all_computed, embeddings, require
from gemexport.formats.activations import Activations
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.coreml import CODEC, FITTED_RMS, NORM_OFFSET, stored_name
from gemexport.formats.coreml.package import coremltools
from gemexport.formats.gemma.model import Model
from gemexport.formats.promise import Promise, shifted_back
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import atomic
from gemexport.formats.storage.reading import copy
from gemexport.formats.tensor import DType, Floats, Grid

VARIANTS = ("int4", "f16", "f32")
PLAIN: dict[str, DType] = {"f16": "f16", "f32": "f32"}  # variants of plain numbers
CONTEXT = 4096
Placing = Literal["all", "linears", "none"]  # of static activation scales
# The names that Hugging Face's swift-transformers looks for.
SLIDING_WINDOW = "co.huggingface.exporters.sliding_window"


def export(
    checkpoint: Checkpoint,
    path: Path,
    *,
    variant: str = VARIANTS[0],
    progress: Progress = ignore,
    context: int | None = None,
    activations: Placing = "all",
) -> Export:
    """Write `checkpoint` (with grids attached) to the package `path`, and its tokenizer beside it.

    `int4` keeps the grids and computes in float16 with float32 where that would overflow; `f16` and `f32` store plain
    weights and compute in these. `context` is how many tokens the KV cache holds (4096, or the model's own if fewer).
    `activations` says which of the checkpoint's static scales are computed with: all, those of linears, or none.
    Raises InputError for an unknown variant, a context that the model lacks, or numbers that float16 cannot hold.
    """
    checkpoint, context, notes = _prepared(checkpoint, variant, context, activations)
    sources = Sources(variant, str(checkpoint.path), progress)
    coremltools()
    from gemexport.exporters.coreml.package import write_package

    program = _program(checkpoint, sources, context)
    with atomic(Path(path)) as folder:
        folder.mkdir()
        write_package(folder, program, _metadata(checkpoint, variant), sources.write)
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    run = f'python -P -m gemexport.validators.runtimes.coreml {quote(str(path))} "The capital of France is"'
    return Export(Path(path), variant, run, notes + sources.notes(), files + _tokenizer(checkpoint, Path(path).parent))


def size(
    checkpoint: Checkpoint, *, variant: str = VARIANTS[0], context: int | None = None, activations: Placing = "all"
) -> int:
    """Bytes of the package that `export` writes and of what lies beside it; raises as it does."""
    checkpoint, context, _ = _prepared(checkpoint, variant, context, activations)
    coremltools()
    from gemexport.exporters.coreml.package import package_bytes

    program = _program(checkpoint, Sources(variant, str(checkpoint.path), ignore), context)
    beside = sum(file.stat().st_size for file in checkpoint.tokenizer_files())
    return package_bytes(program, _metadata(checkpoint, variant)) + beside


def _prepared(
    checkpoint: Checkpoint, variant: str, context: int | None, activations: Placing
) -> tuple[Checkpoint, int, list[str]]:
    """The checkpoint as a variant holds it, how many tokens the cache holds, and notes."""
    if variant not in VARIANTS:
        remedy = f"choose one of {', '.join(VARIANTS)}"
        raise InputError(checkpoint.path, f"there is no Core ML variant {variant!r}", remedy)
    require(checkpoint, supports(checkpoint.model, variant), "coreml")
    longest = checkpoint.architecture.max_positions
    context = min(CONTEXT, longest) if context is None else context
    if not 0 < context <= longest:
        raise InputError(checkpoint.path, f"a context of {context} tokens does not fit", f"give 1 to {longest}")
    rounding = placed(checkpoint.activations, activations)
    if variant == "int4":
        tensors, _, notes = fitting(checkpoint, lambda grid, width: container(grid, width, variant), rounding)
        checkpoint = replace(checkpoint, tensors=tensors)
    else:
        notes = left_out(checkpoint.activations, rounding)
    notes += all_computed(checkpoint.model)
    return replace(checkpoint, activations=rounding), context, notes


def placed(activations: Activations | None, wanted: Placing) -> Activations:
    """The static scales that the program gets: 8-bit integers, as far as they are wanted; MIL has no others."""
    found = Activations() if activations is None or wanted == "none" else activations
    return (found.without_caches() if wanted == "linears" else found).where(lambda item: item.bits == 8)


def supports(model: Model, variant: str) -> str | None:
    """Why no program is written of a model; None where it does."""
    found = embeddings(model)  # else whatever the description of the decoder computes
    return None if found is None else f"no ML program is made of this model: {found}"


def container(grid: Grid, width: int, variant: str) -> Answer:
    """What holds a grid in rows of `width` weights in a variant; any block that divides a row will do.

    Scales and shifts are f16 where that holds all of a tensor's, else f32.
    """
    if variant != "int4":
        return f"the variant {variant} holds plain numbers"
    if grid.kind == "vectors":
        return Container(f"constexpr_lut_to_dense of {grid.codec}, block {grid.block}", grid.scale_dtype)
    if grid.kind == "codebook" and not held(np.asarray(grid.levels), "fp32"):
        return "levels of its codebook are no f32 numbers"
    codes, block = code_type(grid), f"block {grid.block}"
    if codes in ("int4", "int8", "uint4", "uint8") and grid.kind != "codebook":
        name = f"constexpr_blockwise_shift_scale {codes}, {block}"
    else:
        name = f"constexpr_lut_to_dense {codes} and constexpr_blockwise_shift_scale, {block}"
    return Container(f"{name}, biases beside it" if grid.kind == "affine" else name, "f32")


def promises(checkpoint: Checkpoint, variant: str, **_: Any) -> dict[str, Promise]:
    """What a package has to hold of each tensor, by canonical name: norms with the family's offset in float32."""
    offset, plain = np.float32(checkpoint.architecture.norm_offset), PLAIN.get(variant, "f32")
    found = {}
    for name, item in fitted(checkpoint, lambda grid, width: container(grid, width, variant)).items():
        role = checkpoint.model.specs[name].role
        if role.has_rows:
            found[name] = replace(item, plain=plain)
        else:
            back = partial(_read_back, offset=offset if role.is_norm else np.float32(0))
            found[name] = Promise(shifted_back(item.tensor, back))
    return found


def _read_back(values: Floats, offset: np.float32) -> Floats:
    """What value + offset in float32 reads back as."""
    return (values + offset) - offset


def _program(checkpoint: Checkpoint, sources: Sources, context: int) -> Any:
    """The decoder as a MIL program, its weights placeholders that `sources` will fill."""
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    from gemexport.exporters.coreml import backend

    architecture = checkpoint.architecture
    n, end = ct.RangeDim(1, context, 1), ct.RangeDim(1, context, 1)
    inputs = {backend.INPUT_IDS: mb.placeholder((1, n.symbol), types.int32)}
    described = [ct.TensorType(backend.INPUT_IDS, (1, n), np.int32)]
    masks = {backend.SLIDING_MASK if layer.sliding else backend.FULL_MASK for layer in architecture.layers}
    for name in sorted(masks):
        inputs[name] = mb.placeholder((1, 1, n.symbol, end.symbol), types.fp16)
        described.append(ct.TensorType(name, (1, 1, n, end), np.float16))
    for cache in backend.caches(architecture, context):
        inputs[cache.key] = mb.state_tensor_placeholder(cache.shape, types.fp16)
        inputs[cache.value] = mb.state_tensor_placeholder(cache.shape, types.fp16)
    with _fresh_names(mb), Function(inputs, ct.target.iOS18) as function:
        result = logits(architecture, backend.MILBackend(checkpoint, function.inputs, sources, context))
        result.name = backend.LOGITS
        function.set_outputs([result])
    function.set_input_types(tuple(described))
    program = Program()
    program.add_function("main", function)
    return program


@contextmanager
def _fresh_names(builder: Any) -> Iterator[None]:
    """Let coremltools number its implicit constants from nought, so that a second export gives the same bytes."""
    before = dict(builder.name_count)
    builder.name_count.clear()
    try:
        yield
    finally:
        builder.name_count.update(before)


def _metadata(checkpoint: Checkpoint, variant: str) -> dict[str, str]:
    metadata = {
        "gemexport.version": version("gemexport"),
        "gemexport.source": checkpoint.name,
        "gemexport.variant": variant,
        NORM_OFFSET: str(checkpoint.architecture.norm_offset),
        "com.github.apple.coremltools.version": coremltools().__version__,
    }
    if any(layer.sliding for layer in checkpoint.architecture.layers):
        metadata[SLIDING_WINDOW] = str(checkpoint.architecture.sliding_window)
    for tensor in checkpoint.tensors.values():
        if tensor.grid is not None and tensor.grid.kind == "vectors" and variant == "int4":
            metadata[f"{CODEC}{stored_name(tensor.name)}"] = str(tensor.grid.codec)
            if tensor.fitted_rms is not None:
                metadata[f"{FITTED_RMS}{stored_name(tensor.name)}"] = repr(tensor.fitted_rms)
    return metadata


def _tokenizer(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """Copy the tokenizer's files beside the package, where apps look for them."""
    copies = []
    for source in checkpoint.tokenizer_files():
        target = folder / source.name
        with atomic(target) as partial:
            copy(source, partial)
        copies.append(target)
    return copies
