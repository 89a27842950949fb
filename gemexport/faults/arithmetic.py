"""Faults of what an ONNX graph computes: another function, number or mask where one operator has its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from gemexport.faults.operators import changed, replace
from gemexport.faults.weights import Make, Subject

NORM = 5  # which of the norms has another epsilon: the one behind the first attention


def erf(graph: ir.Graph, _: Subject) -> bool:
    """The first activation is the exact GELU."""
    node = next((node for node in graph if node.op_type == "Gelu"), None)
    if node is not None:
        node.attributes["approximate"] = ir.AttrString("approximate", "none")
    return node is not None


def _scores(graph: ir.Graph, change: Callable[[ir.Value], ir.Value]) -> bool:
    """Change the scores of the first attention, before the mask is added to them."""
    softmax = next((node for node in graph if node.op_type == "Softmax"), None)
    masked = None if softmax is None or softmax.inputs[0] is None else softmax.inputs[0].producer()
    if masked is None or masked.inputs[0] is None:
        return False
    new = change(masked.inputs[0])
    made: list[ir.Node] = []
    node = new.producer()
    while node is not None and node.graph is None:
        made.insert(0, node)
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    graph.insert_before(masked, made)
    masked.replace_input_with(0, new)
    return True


def _made(graph: ir.Graph, kind: str, name: str, *inputs: ir.Value | float) -> ir.Value:
    """What an operator gives, a number being a constant of its own; the operator is in no graph yet."""
    values = []
    for place, given in enumerate(inputs):
        if isinstance(given, float):
            label = f"/fault/{name}_{place}"
            array = np.array(given, np.float32)
            given = ir.Value(name=label, shape=ir.Shape(()), type=ir.TensorType(ir.DataType.FLOAT),
                             const_value=ir.Tensor(array, name=label))  # fmt: skip
            graph.initializers[label] = given
        values.append(given)
    node = ir.Node("", kind, values, name=f"/fault/{name}")
    node.outputs[0].name = f"/fault/{name}_output"
    return node.outputs[0]


def attention_softcap(graph: ir.Graph, _: Subject) -> bool:
    """The scores of the first attention are capped."""
    attention = next((node for node in graph if node.op_type == "GroupQueryAttention"), None)
    if attention is not None:
        attention.attributes["softcap"] = ir.AttrFloat32("softcap", 50.0)
        return True

    def capped(scores: ir.Value) -> ir.Value:
        small = _made(graph, "Mul", "small", scores, 1 / 50)
        return _made(graph, "Mul", "capped", _made(graph, "Tanh", "tanh", small), 50.0)

    return _scores(graph, capped)


def attention_scale(graph: ir.Graph, _: Subject) -> bool:
    """The scores of the first attention are larger by 0.2 %."""
    attention = next((node for node in graph if node.op_type == "GroupQueryAttention"), None)
    if attention is not None:
        scale = attention.attributes.get_float("scale", 1.0)
        attention.attributes["scale"] = ir.AttrFloat32("scale", scale * 1.002)
        return True
    return _scores(graph, lambda scores: _made(graph, "Mul", "larger", scores, 1.002))


def mask(graph: ir.Graph, _: Subject) -> bool:
    """What is not to be seen has a score of -20."""
    nodes = [node for node in graph if node.op_type == "Where"]
    for node in nodes:
        replace(graph, node, 2, np.array(-20, np.float32))
    return bool(nodes)


def epsilon(size: float, every: bool) -> Make:
    def edit(graph: ir.Graph, _: Subject) -> bool:
        nodes = [node for node in graph if node.op_type == "RMSNormalization"]
        for node in nodes if every else nodes[NORM : NORM + 1]:
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", size)
        return bool(nodes)

    return changed(edit, "epsilon|departs at")


def top_k(graph: ir.Graph, subject: Subject) -> bool:
    """The first router chooses an expert more."""
    assert subject.decoder.experts is not None
    node = next((node for node in graph if node.op_type == "TopK"), None)
    if node is not None:
        replace(graph, node, 1, np.array([subject.decoder.experts.top_k + 1], np.int64))
    return node is not None
