"""Writes `npu-a8` and `npu-a16`: the NPU's graphs with static integer activations, measured here or given.

What is measured is the graph itself, over the weights that it will have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemexport.exporters.onnx.calibration import add_statistics, measure
from gemexport.exporters.onnx.graph import PRODUCER, GraphBuilder, Weights
from gemexport.exporters.onnx.htp import HtpBackend, row_grid
from gemexport.exporters.onnx.npu import add_decoder, lookup
from gemexport.exporters.onnx.qdq import QdqGraph
from gemexport.exporters.result import Progress
from gemexport.formats.activations.ranges import ActivationRange, ActivationRanges, Activations
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.names import EMBEDDING, PER_LAYER_EMBEDDING
from gemexport.formats.storage.errors import InputError

RANGES = "activations.json"
# 8 bits are for what is multiplied by weights and for what is cached. In norms, residuals and softmax they would cost
# the model: docs/npu.md has the measurement.
PRECISIONS = {
    "npu-a8": Activations(bits=16, linear_bits=8, cache_bits=8),
    "npu-a16": Activations(bits=16, linear_bits=16, cache_bits=16),
}


def write_quantized(
    checkpoint: Checkpoint,
    folder: Path,
    activations: Activations,
    sequences: Sequence[Sequence[int]],
    context: int,
    prefill: int,
    progress: Progress,
) -> list[str]:
    """Write the lookup, the decoder for a prompt's chunk and for one token, and the ranges; returns the notes."""
    weights = Weights(checkpoint.tensors)
    table = lookup(checkpoint.architecture, GraphBuilder(f"{checkpoint.name} embeddings"), weights)
    table.save(folder / "embeddings.onnx", PRODUCER)
    if activations.ranges is None:
        if not any(sequences):
            remedy = "give token sequences to measure them on, or the ranges of an earlier export"
            raise InputError(checkpoint.path, "its activations have no static scales", remedy)
        activations = _measured(checkpoint, folder, activations, sequences, weights, context, prefill, progress)
    graphs = _graphs(checkpoint, activations, weights, context, prefill)
    if not weights.written:
        weights.write(folder, progress)
    for name, graph in graphs.items():
        graph.save(folder / f"{name}.onnx", PRODUCER)
    assert activations.ranges is not None
    activations.ranges.save(folder / RANGES)
    source = f"{activations.ranges.tokens} tokens, {activations.method}"
    return [f"scales of activations come from their ranges on {source}", *_notes(checkpoint)]


def _graphs(
    checkpoint: Checkpoint, activations: Activations, weights: Weights, context: int, prefill: int
) -> dict[str, GraphBuilder]:
    """The decoder for a prompt's chunk and for one token, by name."""
    graphs = {name: QdqGraph(f"{checkpoint.name} {name}", activations) for name in ("prefill", "decode")}
    for graph, length in zip(graphs.values(), (prefill, 1), strict=True):
        add_decoder(HtpBackend(checkpoint.architecture, graph, weights, length, context))
    return {**graphs}


def quantized_bytes(checkpoint: Checkpoint, activations: Activations, context: int, prefill: int) -> int:
    """Bytes of what `write_quantized` writes, as good as: with made-up ranges where there are none yet."""
    weights = Weights(checkpoint.tensors)
    table = lookup(checkpoint.architecture, GraphBuilder(f"{checkpoint.name} embeddings"), weights)
    measuring = QdqGraph(f"{checkpoint.name} measuring", activations.model_copy(update={"ranges": None}))
    add_decoder(HtpBackend(checkpoint.architecture, measuring, weights, prefill, context))
    keys = [*measuring.watched, *measuring.watched_scores]
    # No two of them alike: equal scales and zero points are one constant.
    parts = {key: (number + 1) / len(keys) for number, key in enumerate(keys)}
    seen = {key: ActivationRange(minimum=-1, maximum=part, low=-1, high=part) for key, part in parts.items()}
    ranges = activations.ranges or ActivationRanges(tokens=0, percentile=0.0, ranges=seen)
    known = activations.model_copy(update={"ranges": ranges})
    graphs = [table, *_graphs(checkpoint, known, weights, context, prefill).values()]
    listed = len(ranges.model_dump_json(indent=1))
    return sum(weights.sizes.values()) + sum(graph.nbytes(PRODUCER) for graph in graphs) + listed


def _measured(
    checkpoint: Checkpoint,
    folder: Path,
    activations: Activations,
    sequences: Sequence[Sequence[int]],
    weights: Weights,
    context: int,
    prefill: int,
    progress: Progress,
) -> Activations:
    """The settings with ranges; the weights that the graphs share are written on the way."""
    a = checkpoint.architecture
    graph = QdqGraph(f"{checkpoint.name} measuring", activations)
    add_decoder(HtpBackend(a, graph, weights, prefill, context))
    add_statistics(graph)
    weights.write(folder, progress)
    file = folder / "measuring.onnx"
    graph.save(file, PRODUCER)
    ranges = measure(folder / "embeddings.onnx", file, sequences, context)
    file.unlink()
    return activations.model_copy(update={"ranges": ranges})


def measured(
    checkpoint: Checkpoint,
    folder: Path,
    activations: Activations,
    sequences: Sequence[Sequence[int]],
    context: int,
    prefill: int,
    progress: Progress,
) -> ActivationRanges:
    """The ranges of the NPU's graphs on token sequences; `folder` takes what there is to measure.

    Those of `npu-a8` hold for both precisions: its linears read and write other integers than what lies between.
    """
    weights = Weights(checkpoint.tensors)
    table = lookup(checkpoint.architecture, GraphBuilder(f"{checkpoint.name} embeddings"), weights)
    table.save(folder / "embeddings.onnx", PRODUCER)
    found = _measured(checkpoint, folder, activations, sequences, weights, context, prefill, progress).ranges
    assert found is not None
    return found


def _notes(checkpoint: Checkpoint) -> list[str]:
    """What the NPU's integers could not hold."""
    looked_up = {PER_LAYER_EMBEDDING} | ({EMBEDDING} if not checkpoint.architecture.tied else set())
    requantized = [
        name for name, tensor in checkpoint.tensors.items()
        if checkpoint.model.specs[name].role.is_matrix and name not in looked_up and row_grid(tensor) != tensor.grid
    ]  # fmt: skip
    if not requantized:
        return []
    return [f"{len(requantized)} linears are requantized to 8 bits with one scale a row: the NPU knows no other grid"]
