"""Measures the ranges of activations: runs the graph in floating point on token sequences with ONNX Runtime.

The statistics are operators of the graph itself, so what is held of an activation is four numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gemexport.exporters.onnx.qdq import QdqGraph
from gemexport.formats.activations.ranges import ActivationRange, ActivationRanges

PERCENTILE = 99.99
STATISTICS = ("minimum", "maximum", "low", "high")

Arrays = dict[str, NDArray[Any]]


def add_statistics(graph: QdqGraph, percentile: float = PERCENTILE) -> None:
    """Make the statistics of everything that is watched outputs of `graph`."""
    for key, value in list(graph.watched.items()):
        _statistics(graph, key, value, percentile)
    for key, (scores, margin) in graph.watched_scores.items():
        # The lowest maximum of a row, less the margin, to the highest.
        best = graph.raw("ReduceMax", [scores, graph.constant([-1], np.int64)])
        least = graph.raw("Sub", [best, graph.constant(margin, np.float32)])
        _statistics(graph, key, graph.raw("Concat", [best, least], axis=-1), 100.0)


def _statistics(graph: QdqGraph, key: str, value: ir.Value, percentile: float) -> None:
    flat = graph.raw("Reshape", [value, graph.constant([-1], np.int64)])
    found = [graph.raw(kind, [flat], keepdims=0) for kind in ("ReduceMin", "ReduceMax")]
    outside = graph.constant((100 - percentile) / 100, np.float32)
    size = graph.raw("Cast", [graph.raw("Size", [flat])], to=int(ir.DataType.FLOAT))
    count = graph.raw("Cast", [graph.raw("Floor", [graph.raw("Mul", [size, outside])])], to=int(ir.DataType.INT64))
    count = graph.raw(
        "Reshape", [graph.raw("Add", [count, graph.constant(1, np.int64)]), graph.constant([1], np.int64)]
    )
    for largest in (0, 1):
        extremes = graph.raws("TopK", 2, [flat, count], largest=largest)[0]
        found.append(graph.raw("Gather", [extremes, graph.constant(-1, np.int64)], axis=0))
    for name, statistic in zip(STATISTICS, found, strict=True):
        graph.output(statistic, f"{name}/{key}", ir.DataType.FLOAT, [])


def chunks(sequences: Sequence[Sequence[int]], length: int, context: int) -> Iterator[tuple[list[int], int]]:
    """The sequences as one stream in pieces of `length` tokens, each with the position of its first.

    Padding would be measured along with the tokens, so there is none: the last piece reaches back where too little is
    left for it, and a stream shorter than a piece repeats. Positions start again where the context is full.
    """
    stream = [token for sequence in sequences for token in sequence]
    if not stream:
        raise ValueError("there are no tokens to measure activations on")
    while len(stream) < length:
        stream = stream + stream
    per_context = max(context // length, 1)
    for number in range(len(stream) // length):
        yield stream[number * length : (number + 1) * length], number % per_context * length
    if len(stream) % length:
        yield stream[-length:], 0


def measure(
    lookup: Path, decoder: Path, sequences: Sequence[Sequence[int]], context: int, percentile: float = PERCENTILE
) -> ActivationRanges:
    """The ranges of what `add_statistics` watches in the graph `decoder`, fed by the graph `lookup`."""
    embeddings, graph = _session(lookup), _session(decoder)
    inputs = {item.name: item for item in graph.get_inputs()}
    length = int(inputs["position_ids"].shape[1])
    names = [item.name for item in graph.get_outputs() if item.name != "logits"]
    caches = [name for name in names if name.startswith("present.")]
    found: dict[str, list[float]] = {name: [] for name in names if name not in caches}
    tokens = 0
    cache: Arrays = {}
    for piece, start in chunks(sequences, length, context):
        if start == 0:
            cache = {name: np.zeros(item.shape, np.float32) for name, item in inputs.items() if name.startswith("past")}
        looked_up = [item.name for item in embeddings.get_outputs()]
        fed: Arrays = dict(
            zip(looked_up, embeddings.run(looked_up, {"input_ids": np.array([piece], np.int64)}), strict=True)
        )
        fed["position_ids"] = np.arange(start, start + length, dtype=np.int32)[None]
        outputs = dict(zip(names, graph.run(names, fed | cache), strict=True))
        cache = {name.replace("present", "past_key_values"): outputs[name] for name in caches}
        for name, values in found.items():
            values.append(float(outputs[name]))
        tokens += length
    return ActivationRanges(tokens=tokens, percentile=percentile, ranges=_ranges(found))


def _ranges(found: dict[str, list[float]]) -> dict[str, ActivationRange]:
    """What was measured in each piece, as one range by key."""
    keys = [name.removeprefix("minimum/") for name in found if name.startswith("minimum/")]
    return {
        key: ActivationRange(
            minimum=min(found[f"minimum/{key}"]),
            maximum=max(found[f"maximum/{key}"]),
            low=float(np.mean(found[f"low/{key}"])),
            high=float(np.mean(found[f"high/{key}"])),
        )
        for key in keys
    }


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
