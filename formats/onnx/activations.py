"""The static activation scales of an ONNX model, read back from the QuantizeLinear operators around its linears."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemexport.formats.activations import Activations, CacheActivations, LinearActivations, Quantizer
from gemexport.formats.onnx import canonical_name, graph_files, read_model
from gemexport.formats.onnx.form import BROKEN
from gemexport.formats.onnx.stored import FLOATS, Elements, described
from gemexport.formats.storage.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

_CACHE = re.compile(r"^past_key_values\.(\d{1,6})\.(key|value)$")
INTEGERS = {"INT8": (8, True), "UINT8": (8, False), "INT16": (16, True), "UINT16": (16, False)}


def activations(path: str | Path) -> Activations | None:
    """The quantizers of linears' inputs and outputs and of the caches in a model's graphs; None where there are none.

    Raises InputError for graphs of one folder that disagree, and for integers that are read back as others.
    """
    linears: dict[str, LinearActivations] = {}
    caches: dict[int, CacheActivations] = {}
    for file in graph_files(Path(path)):
        graph = read_model(file).graph
        _check_pairs(graph, file)
        for weight, linear in _linears(graph, file):
            if linears.setdefault(weight, linear) != linear:
                raise InputError(file, f"the activations of {weight} are others than in the graph beside it", BROKEN)
        for layer, cache in _caches(graph, file).items():
            if caches.setdefault(layer, cache) != cache:
                raise InputError(file, f"the cache of layer {layer} is another than in the graph beside it", BROKEN)
    found = {weight: linear for weight, linear in linears.items() if linear != LinearActivations()}
    return Activations(found, caches) or None


def _check_pairs(graph: ir.Graph, file: Path) -> None:
    """Raise InputError where a DequantizeLinear has another scale or zero point than the QuantizeLinear before it."""
    for node in graph:
        if node.op_type != "QuantizeLinear":
            continue
        for user, _ in node.outputs[0].uses():
            if user.op_type == "DequantizeLinear" and _quantizer(user, file) != _quantizer(node, file):
                problem = f"{user.name} reads back other integers than {node.name} writes (scale or zero point)"
                raise InputError(file, problem, BROKEN)


def _linears(graph: ir.Graph, file: Path) -> Iterator[tuple[str, LinearActivations]]:
    """The linears of a graph by their weight's canonical name."""
    for node in graph:
        if node.op_type != "MatMul" or node.inputs[1] is None or node.inputs[0] is None:
            continue
        weight = _initializer(node.inputs[1])
        name = canonical_name(weight.name or "") if weight is not None else None
        if name is not None:
            before = node.inputs[0].producer()
            after = next((use for use, _ in node.outputs[0].uses() if use.op_type == "QuantizeLinear"), None)
            rounded = before is not None and before.op_type == "DequantizeLinear"
            yield name, LinearActivations(_quantizer(before, file) if rounded else None, _quantizer(after, file))


def _initializer(value: ir.Value) -> ir.Value | None:
    """The initializer that a value comes from, through casts and its unpacking."""
    producer = value.producer()
    while producer is not None and producer.op_type in ("Cast", "DequantizeLinear") and producer.inputs[0] is not None:
        value = producer.inputs[0]
        producer = value.producer()
    return value if value.const_value is not None else None


def _caches(graph: ir.Graph, file: Path) -> dict[int, CacheActivations]:
    """The caches of integers that a graph takes, by layer."""
    found: dict[int, dict[str, Quantizer | None]] = {}
    for value in graph.inputs:
        match = _CACHE.match(value.name or "")
        if match and value.dtype is not None and value.dtype.name in INTEGERS:
            found.setdefault(int(match[1]), {})[match[2]] = _quantizer(_reader(value), file)
    return {layer: CacheActivations(**kinds) for layer, kinds in found.items()}


def _reader(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear that a cache is read through, behind what is appended to it."""
    for node, _ in value.uses():
        if node.op_type == "DequantizeLinear":
            return node
        if node.op_type == "Concat":
            return _reader(node.outputs[0])
    return None


def _quantizer(node: ir.Node | None, file: Path) -> Quantizer | None:
    """The integers of a QuantizeLinear or DequantizeLinear with one scale; None for others."""
    if node is None or len(node.inputs) < 3 or node.inputs[1] is None or node.inputs[2] is None:
        return None
    scale, zero = node.inputs[1], node.inputs[2]
    if scale.const_value is None or zero.const_value is None:
        return None
    (kind, sizes), (scale_kind, scales) = described(zero, file), described(scale, file)
    if kind not in INTEGERS or scale_kind not in FLOATS or np.prod(scales) != 1 or np.prod(sizes) != 1:
        return None
    bits, signed = INTEGERS[kind]
    numbers = (Elements(value, file).whole().reshape(-1)[0] for value in (scale, zero))
    size, middle = numbers
    return Quantizer(float(np.float32(size)), int(middle), bits, signed)
