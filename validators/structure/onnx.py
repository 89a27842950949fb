"""The graphs of an ONNX folder as programs whose structure can be judged, without their weights.

Operators: https://onnx.ai/onnx/operators/, and ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemexport.formats.gemma.names import role_of
from gemexport.formats.onnx import canonical_name, graph_files, read_model
from gemexport.formats.onnx.stored import NO_NUMBERS, Elements
from gemexport.validators.structure.program import Kind, Number, Operation, Program

if TYPE_CHECKING:
    import onnx_ir as ir

# What moves numbers, or stores them in another way.
_SAME = frozenset((
    "Cast", "Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather",
    "GatherND", "GatherBlockQuantized", "Expand", "Tile", "QuantizeLinear", "DequantizeLinear", "RotaryEmbedding",
))  # fmt: skip
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(_SAME, "same"),
    "Concat": "join", "Add": "add", "Sub": "add", "Mul": "mul", "Div": "div", "Pow": "power", "Tanh": "tanh",
    "Erf": "erf", "Sigmoid": "sigmoid", "Sqrt": "root", "Reciprocal": "root", "ReduceMean": "mean",
    "Relu": "relu", "Softmax": "softmax",
    **dict.fromkeys(("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"), "norm"),
}  # fmt: skip
_GELUS = {"FastGelu": "tanh", "BiasGelu": "erf", "QuickGelu": "sigmoid"}
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits")
_ATTENTIONS = {"GroupQueryAttention": (0, 1, 3), "MultiHeadAttention": (0, 1), "Attention": (0, 1, 4)}
_DTYPES = {"FLOAT16": "f16", "BFLOAT16": "bf16"}


def programs(path: Path) -> dict[str, Program]:
    """The programs of the artefact at `path`, by file name. Raises InputError for graphs that are not whole."""
    return {file.name: _program(read_model(file).graph, file) for file in graph_files(path)}


def _program(graph: ir.Graph, file: Path) -> Program:
    found = Program(outputs=tuple(str(value.name) for value in graph.outputs))
    for value in graph.initializers.values():
        _constant(found, value, file)
    _add(found, graph)
    return found


def _constant(program: Program, value: ir.Value, file: Path) -> None:
    name = str(value.name)
    program.fixed.add(name)
    weight = canonical_name(name)
    if weight is not None and role_of(weight) is not None:
        program.weights[name] = weight
    elif value.const_value is not None and value.const_value.size == 1:
        dtype = value.const_value.dtype.name
        if dtype not in NO_NUMBERS:
            (number,) = Elements(value, file).at(np.array([0]))
            program.numbers[name] = _number(number, dtype)


def _number(value: Any, dtype: str) -> Number:
    return Number.of(float(value), _DTYPES.get(dtype, dtype))


def _add(program: Program, graph: ir.Graph) -> None:
    """The operators of a graph, and of those inside of its loops and branches."""
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type.name == "GRAPH":
                _add(program, attribute.as_graph())
        if node.op_type == "Constant":
            _add_constant(program, node)
        else:
            program.add(_operation(program, node))
            _fold(program, node)


def _add_constant(program: Program, node: ir.Node) -> None:
    name = str(node.outputs[0].name)
    program.fixed.add(name)
    value = node.attributes.get("value")
    stored = None if value is None or value.type.name != "TENSOR" else value.as_tensor()
    if stored is not None and stored.size == 1 and stored.dtype.name not in NO_NUMBERS:
        program.numbers[name] = _number(stored.numpy().reshape(-1)[0], stored.dtype.name)


def _fold(program: Program, node: ir.Node) -> None:
    """A constant that is only moved stays one; of an integer with a scale it is what these stand for."""
    source, output = _names(node)[:1], str(node.outputs[0].name)
    if node.op_type not in _SAME or not source or source[0] not in program.fixed:
        return
    program.fixed.add(output)
    number = program.numbers.get(source[0])
    if number is None or node.op_type in ("QuantizeLinear", "Gather", "GatherND"):
        return
    if node.op_type == "DequantizeLinear":
        scale, *zero = (program.numbers.get(name) for name in _names(node)[1:])
        if scale is None or None in zero:
            return
        value = (number.value - sum(item.value for item in zero if item is not None)) * scale.value
        # The integer was rounded to: half a step.
        number = Number(value, scale.rounding + (abs(scale.value / value) / 2 if value else 0))
    elif node.op_type == "Cast":
        number = Number(number.value, number.rounding + _number(number.value, _cast_to(node)).rounding)
    program.numbers[output] = number


def _cast_to(node: ir.Node) -> str:
    import onnx_ir as ir

    return ir.DataType(node.attributes["to"].as_int()).name


def _names(node: ir.Node) -> tuple[str, ...]:
    return tuple("" if value is None else str(value.name) for value in node.inputs)


def _operation(program: Program, node: ir.Node) -> Operation:
    inputs, outputs = _names(node), tuple(str(value.name) for value in node.outputs)
    name = node.name or f"{node.op_type} {outputs[0]}"

    def made(kind: Kind, inputs: tuple[str, ...] = inputs, **further: Any) -> Operation:
        return Operation(kind, name, inputs, outputs, **further)

    if node.op_type in _PRODUCTS:
        weight = program.behind(inputs[1])
        factor = Number(node.attributes.get_float("alpha", 1.0), 0.0)
        return made("matmul" if weight is None else "linear", inputs[: 2 if weight is None else 1], weight=weight,
                    factor=factor)  # fmt: skip
    if node.op_type in _ATTENTIONS and (node.domain or node.op_type == "Attention"):
        return _attention(node, made, inputs)
    if node.op_type == "Where":
        return made("join", inputs[1:])
    if node.op_type == "Gelu" or node.op_type in _GELUS:
        plain = "tanh" if node.attributes.get_string("approximate", "none") == "tanh" else "erf"
        return made("gelu", inputs[:1], mode=_GELUS.get(node.op_type, plain))
    kind = _KINDS.get(node.op_type, "other")
    if kind == "norm":
        epsilon = Number(node.attributes.get_float("epsilon", 1e-5))  # what the operators add where they do not say it
        return made(kind, inputs[:1], weight=_norm_weight(program, inputs), epsilon=epsilon)
    if kind in ("same", "mean", "relu", "softmax"):
        return made(kind, inputs[:1])
    return made(kind)


def _norm_weight(program: Program, inputs: tuple[str, ...]) -> str | None:
    """The weight of a norm, as it is or with the family's offset added."""
    scale = inputs[1] if len(inputs) > 1 else ""
    maker = program.makers.get(scale)
    return program.behind(maker.inputs[0] if maker is not None and maker.kind == "add" else scale)


def _attention(node: ir.Node, made: Callable[..., Operation], inputs: tuple[str, ...]) -> Operation:
    """Queries, then keys and the keys before them."""
    if node.op_type == "Attention" and node.domain:
        return made("other")  # queries, keys and values in one
    read = tuple(inputs[place] for place in _ATTENTIONS[node.op_type] if place < len(inputs) and inputs[place])
    scale, cap = (node.attributes.get_float(key, 0.0) for key in ("scale", "softcap"))
    return made("attention", read, factor=Number(scale) if scale else None, softcap=Number(cap) if cap else None)
