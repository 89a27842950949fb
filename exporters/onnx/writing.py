"""An ONNX folder: what a variant holds of each tensor, its bytes, and the writing of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any, Literal, get_args

import onnx_ir as ir

from gemexport.exporters.fitting import Answer, Container, fitting, left_out
from gemexport.exporters.fitting import promises as fitted
from gemexport.exporters.graphs import decoder
from gemexport.exporters.onnx import VARIANTS, supports, transformers_js
from gemexport.exporters.onnx.additive import byte_notes
from gemexport.exporters.onnx.common import KINDS, stored_bits
from gemexport.exporters.onnx.encoder import add_vectors
from gemexport.exporters.onnx.genai_config import genai_config
from gemexport.exporters.onnx.graph import PRODUCER, GraphBuilder, Weights
from gemexport.exporters.onnx.htp import held_by_rows
from gemexport.exporters.onnx.npu import NpuBackend, add_decoder, lookup
from gemexport.exporters.onnx.promised import integer_promises
from gemexport.exporters.onnx.quantized import PRECISIONS, measured, quantized_bytes, write_quantized
from gemexport.exporters.onnx.runtime import OnnxRuntimeBackend, block_of
from gemexport.exporters.result import Export, Progress, ignore
from gemexport.exporters.streaming import decoder_config, read_settings, settings_bytes, write_settings
from gemexport.exporters.support import all_computed, require
from gemexport.formats.activations import Activations, CacheActivations, LinearActivations
from gemexport.formats.activations.ranges import ActivationRanges, Method, read_ranges
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.model import EMBEDDING, LOGITS
from gemexport.formats.promise import Promise
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import atomic
from gemexport.formats.tensor import Grid, Plain

Placing = Literal["all", "linears", "none"]  # of static activation scales
Layout = Literal["flat", "transformers.js"]
CONTEXT, PREFILL = 2048, 128
# What goes along: it runs the graphs with nothing of ours, and a text to try it with.
SCRIPTS = {LOGITS: ("generate.py", "The capital of France is"), EMBEDDING: ("embed.py", "What is a vector?")}


def export(
    checkpoint: Checkpoint,
    path: Path,
    *,
    variant: str = VARIANTS[0],
    context: int = CONTEXT,
    prefill: int = PREFILL,
    calibration: Sequence[Sequence[int]] = (),
    ranges: str | Path | None = None,
    range_method: Method = "minmax",
    activations: Placing = "all",
    layout: Layout = "flat",
    progress: Progress = ignore,
) -> Export:
    """Write `checkpoint`, with its grids, to the folder `path`; it appears when it is whole.

    `context` and `prefill`, in positions, are the fixed sizes of `npu`: what its caches hold, and how many tokens
    its prompt graph takes at once. `activations` says which of the checkpoint's static scales `npu` computes with: all,
    those of linears with caches in floating point, or none. `npu-a8` and `npu-a16` measure activations on the token
    sequences `calibration`, or take the `ranges` of a JSON file that an earlier export wrote. The `layout` is for
    `int4` and `f32`: the graph in the folder itself, or where transformers.js looks for it. Raises InputError when the
    folder cannot be written or the disk is full, and for a `range_method` or a `layout` that does not exist.
    """
    path = Path(path)
    if range_method not in get_args(Method):
        raise InputError(path, f"there is no range method {range_method}", f"use one of {', '.join(get_args(Method))}")
    if layout not in get_args(Layout):
        raise InputError(path, f"there is no layout {layout}", f"use one of {', '.join(get_args(Layout))}")
    if layout == "transformers.js":
        transformers_js.check(checkpoint, variant)
    checkpoint, notes = _prepared(checkpoint, variant, activations)
    context = min(context, checkpoint.architecture.max_positions)
    with atomic(path) as partial:
        partial.mkdir()
        if variant in PRECISIONS:
            known = None if ranges is None else read_ranges(Path(ranges))
            settings = PRECISIONS[variant].model_copy(update={"method": range_method, "ranges": known})
            notes += write_quantized(checkpoint, partial, settings, calibration, context, prefill, progress)
        else:
            plan = _plan(checkpoint, variant, context, prefill)
            plan.weights.write(partial, progress)
            for name, graph in plan.graphs.items():
                graph.save(partial / name, PRODUCER)
            for name, text in plan.texts.items():
                (partial / name).write_text(text, "utf-8")
        script, text = SCRIPTS[checkpoint.model.gives]
        shutil.copyfile(Path(__file__).with_name(script), partial / script)
        write_settings(partial, decoder_config(checkpoint), checkpoint)
        if layout == "transformers.js":
            transformers_js.arrange(partial, variant)
    run = f"python {quote(str(path / script))} {quote(text)}"
    return Export(
        path=path,
        variant=variant,
        run=run,
        notes=notes,
        files=sorted(file for file in path.rglob("*") if file.is_file()),
    )


def size(
    checkpoint: Checkpoint,
    *,
    variant: str = VARIANTS[0],
    context: int = CONTEXT,
    prefill: int = PREFILL,
    ranges: str | Path | None = None,
    range_method: Method = "minmax",
    activations: Placing = "all",
    layout: Layout = "flat",
) -> int:
    """Bytes of what `export` writes; raises as it does. Of `npu-a8` and `npu-a16` within a hundredth."""
    checkpoint, _ = _prepared(checkpoint, variant, activations)
    context = min(context, checkpoint.architecture.max_positions)
    script = Path(__file__).with_name(SCRIPTS[checkpoint.model.gives][0])
    settings = script.stat().st_size + settings_bytes(decoder_config(checkpoint), checkpoint)
    if variant in PRECISIONS:
        return settings + quantized_bytes(checkpoint, PRECISIONS[variant], context, prefill)
    plan = _plan(checkpoint, variant, context, prefill)
    graphs = sum(graph.nbytes(PRODUCER) for graph in plan.graphs.values())
    texts = sum(len(text.encode()) for text in plan.texts.values())
    return settings + sum(plan.weights.sizes.values()) + graphs + texts


def _prepared(checkpoint: Checkpoint, variant: str, activations: Placing) -> tuple[Checkpoint, list[str]]:
    """The checkpoint as a variant holds it, and notes."""
    require(checkpoint, supports(checkpoint.model, variant), "onnx")
    rounding = placed(checkpoint.activations, activations) if variant == "npu" else Activations()
    if variant in ("f32", *PRECISIONS):
        notes = left_out(checkpoint.activations)
    else:
        tensors, _, notes = fitting(checkpoint, lambda grid, width: container(grid, width, variant), rounding)
        checkpoint = replace(checkpoint, tensors=tensors)
    notes += byte_notes(checkpoint.tensors) if variant != "f32" else []
    notes += all_computed(checkpoint.model) if variant == "npu" else []
    return replace(checkpoint, activations=rounding), notes


def ranges(
    checkpoint: Checkpoint,
    scratch: Path,
    calibration: Sequence[Sequence[int]],
    *,
    context: int = CONTEXT,
    prefill: int = PREFILL,
    progress: Progress = ignore,
) -> ActivationRanges:
    """The ranges of activations on token sequences, for `export(…, ranges=…)` of `npu-a8` and `npu-a16` alike.

    `scratch` is a folder that is made for the graphs to measure, and gone afterwards.
    """
    context = min(context, checkpoint.architecture.max_positions)
    checkpoint = replace(checkpoint, activations=None)
    shutil.rmtree(scratch, ignore_errors=True)  # a run that was killed may have left it
    scratch.mkdir(parents=True)
    try:
        return measured(checkpoint, scratch, PRECISIONS["npu-a8"], calibration, context, prefill, progress)
    finally:
        shutil.rmtree(scratch)


def placed(activations: Activations | None, wanted: Placing) -> Activations:
    """The static scales that the NPU's graphs get: whole integers of 8 or 16 bits, as far as they are wanted."""
    found = Activations() if activations is None or wanted == "none" else activations
    found = found.without_caches() if wanted == "linears" else found

    def fits(both: LinearActivations | CacheActivations) -> bool:
        return all(side is None or side.bits in (8, 16) for side in vars(both).values())

    return Activations(
        {name: both for name, both in found.linears.items() if fits(both)},
        {layer: both for layer, both in found.caches.items() if fits(both)},
    )


def container(grid: Grid, width: int, variant: str) -> Answer:
    """What holds a grid in rows of `width` weights in a variant."""
    if variant == "f32":
        return "the variant f32 holds plain numbers"
    if grid.kind == "vectors":
        return Container(f"Gather of {grid.codec}, block {grid.block}", grid.scale_dtype)
    if variant in PRECISIONS:
        if held_by_rows(grid, width):
            return Container(f"DequantizeLinear INT{max(grid.bits, 4)}, a row", "f32")
        return "the NPU knows signed 2-, 4- and 8-bit codes with one scale a row"
    if grid.kind not in KINDS:
        return f"there is no operator for {grid.bits}-bit codes of the kind {grid.kind}"
    bits, shifted = stored_bits(grid.bits, width), grid.kind == "zero-point"
    if variant == "npu":
        size = "one scale a row" if grid.block == width else f"block {grid.block}"
        return Container(f"DequantizeLinear {'UINT' if shifted else 'INT'}{bits}, {size}", "f32")
    block = block_of(grid)
    if block is None:
        return f"ONNX Runtime has no block for blocks of {grid.block} weights"
    return Container(f"MatMulNBits {bits} bit, block {block}{', zero points' if shifted else ''}", "f32")


def promises(checkpoint: Checkpoint, variant: str, **_: Any) -> dict[str, Promise]:
    """What the graphs have to hold of each tensor, by canonical name."""
    if variant in PRECISIONS:
        return integer_promises(checkpoint, PRECISIONS[variant].bits)
    if variant == "f32":
        return {name: Promise(Plain(tensor)) for name, tensor in checkpoint.tensors.items()}
    return fitted(checkpoint, lambda grid, width: container(grid, width, variant))


@dataclass(frozen=True)
class _Plan:
    """A folder before its data: graphs by file name over the same weights, and what else is written."""

    weights: Weights
    graphs: dict[str, GraphBuilder]
    texts: dict[str, str] = field(default_factory=dict)


def _plan(checkpoint: Checkpoint, variant: str, context: int, prefill: int) -> _Plan:
    """The graphs of a variant that computes in floating point."""
    if variant == "npu":
        return _npu(checkpoint, context, prefill)
    return _runtime(checkpoint, variant == "int4")


def _runtime(checkpoint: Checkpoint, quantized: bool) -> _Plan:
    """One graph with free sizes, and the configuration of onnxruntime-genai."""
    a, embedder = checkpoint.architecture, checkpoint.model.embedder
    weights = Weights(checkpoint.tensors)
    graph = GraphBuilder(checkpoint.name)
    if embedder is not None:
        return _Plan(weights, {"model.onnx": add_vectors(a, embedder, graph, weights, quantized)})
    backend = OnnxRuntimeBackend(a, graph, weights, quantized)
    logits = decoder.logits(a, backend)
    graph.output(logits, "logits", ir.DataType.FLOAT, ["batch_size", "sequence_length", a.vocab_size])
    generation = read_settings(checkpoint.assets / "generation_config.json")
    text = json.dumps(genai_config(checkpoint.model, "model.onnx", generation), indent=2, sort_keys=True)
    return _Plan(weights, {"model.onnx": graph}, {"genai_config.json": f"{text}\n"})


def _npu(checkpoint: Checkpoint, context: int, prefill: int) -> _Plan:
    """The lookup, and the decoder for a prompt's chunk and for one token, over the same weights."""
    a = checkpoint.architecture
    weights = Weights(checkpoint.tensors)
    graphs = {"embeddings.onnx": lookup(a, GraphBuilder(f"{checkpoint.name} embeddings"), weights)}
    for name, length in (("prefill", prefill), ("decode", 1)):
        graph = GraphBuilder(f"{checkpoint.name} {name}")
        graphs[f"{name}.onnx"] = add_decoder(NpuBackend(a, graph, weights, length, context, checkpoint.activations))
    return _Plan(weights, graphs)
