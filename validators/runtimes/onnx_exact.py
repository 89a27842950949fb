"""Evaluates a quantized ONNX graph in float64: what its operators mean, without a runtime's fused integer kernels.

Integers are exact in float64, and so are their products with float32 scales; sums and functions are off by 1e-16 of
themselves, which is nothing beside a step of 16 bits. It is what a runtime is judged against, not what is shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import pi, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gemexport.formats.storage.errors import InputError

Array = NDArray[Any]
Compute = Callable[["ir.Node", list[Any]], Any]


@dataclass(frozen=True)
class GraphValue:
    """An input or output: its type as ONNX Runtime spells it, `tensor(uint8)`."""

    name: str
    shape: list[int | None]  # None where a size is free
    type: str


def _described(value: ir.Value) -> GraphValue:
    assert value.shape is not None
    assert value.dtype is not None
    kind = value.dtype.name.lower()
    sizes = [size if isinstance(size, int) else None for size in value.shape]
    return GraphValue(str(value.name), sizes, f"tensor({kind})")


class ExactGraph:
    """A graph of ONNX's standard operators, those that the NPU variants are made of."""

    def __init__(self, file: Path) -> None:
        self._graph = ir.load(file).graph
        self.file = file
        unknown = sorted({node.op_type for node in self._graph} - set(OPERATORS))
        if unknown:
            remedy = "give one of the graphs of an NPU variant"
            raise InputError(file, f"its operators {', '.join(unknown)} have no exact arithmetic here", remedy)
        self._last = {value: i for i, node in enumerate(self._graph) for value in node.inputs if value is not None}

    def get_inputs(self) -> list[GraphValue]:
        """The graph's inputs, as an ONNX Runtime session has them."""
        return [_described(value) for value in self._graph.inputs]

    def get_outputs(self) -> list[GraphValue]:
        """The graph's outputs."""
        return [_described(value) for value in self._graph.outputs]

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs called `names`, or all of them; floating point comes as float64."""
        wanted = list(names or (output.name for output in self.get_outputs()))
        found = {name: value for name, value in self.values(feeds) if name in wanted}
        return [found[name] for name in wanted]

    def values(self, feeds: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
        """Every value as it is computed, by name; what no operator reads any more is not held."""
        held: dict[ir.Value, Array] = {value: _wide(feeds[str(value.name)]) for value in self._graph.inputs}
        for index, node in enumerate(self._graph):
            inputs = [None if value is None else self._input(held, value) for value in node.inputs]
            result = OPERATORS[node.op_type](node, inputs)
            for value, array in zip(node.outputs, result if isinstance(result, list) else [result], strict=True):
                held[value] = array
                yield str(value.name), array
            for used in node.inputs:
                if used is not None and self._last[used] == index:
                    held.pop(used, None)

    @staticmethod
    def _input(held: Mapping[ir.Value, Array], value: ir.Value) -> Array:
        if value in held:
            return held[value]
        assert value.const_value is not None
        return _wide(value.const_value.numpy())


def _wide(array: Array) -> Array:
    """Floating point as float64, integers of any width as they are."""
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _spread(node: ir.Node, parameter: Array, x: Array) -> Array:
    """A scale or zero point in float64, repeated along its axis so that it broadcasts with what it belongs to."""
    parameter = parameter.astype(np.float64)
    axis, block = _attribute(node, "axis", 1), _attribute(node, "block_size", 0)
    if block:
        return np.repeat(parameter, block, axis=axis)
    if parameter.size == 1:
        return parameter.reshape(())
    shape = [1] * x.ndim
    shape[axis] = -1
    return parameter.reshape(shape)


def _quantize(node: ir.Node, inputs: list[Any]) -> Array:
    x, scale, zero = inputs
    limits = np.iinfo(zero.dtype)
    q = np.rint(x / _spread(node, scale, x)) + _spread(node, zero, x)
    found: Array = np.clip(q, limits.min, limits.max).astype(zero.dtype)
    return found


def _dequantize(node: ir.Node, inputs: list[Any]) -> Array:
    x, scale = inputs[:2]
    zero = 0.0 if len(inputs) < 3 else _spread(node, inputs[2], x)
    found: Array = (x.astype(np.float64) - zero) * _spread(node, scale, x)
    return found


def _rms_norm(node: ir.Node, inputs: list[Any]) -> Array:
    x, scale = inputs
    found: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + _attribute(node, "epsilon", 1e-5)) * scale
    return found


def _gelu(node: ir.Node, inputs: list[Any]) -> Array:
    if _attribute(node, "approximate", "none") != "tanh":
        raise ValueError("Gelu is exact here in its tanh form alone")
    x = inputs[0]
    found: Array = 0.5 * x * (1 + np.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))
    return found


def _softmax(_: ir.Node, inputs: list[Any]) -> Array:
    powers = np.exp(inputs[0] - inputs[0].max(-1, keepdims=True))
    found: Array = powers / powers.sum(-1, keepdims=True)
    return found


def _reshape(_: ir.Node, inputs: list[Any]) -> Array:
    x, shape = inputs
    found: Array = x.reshape([x.shape[i] if size == 0 else int(size) for i, size in enumerate(shape)])
    return found


def _slice(_: ir.Node, inputs: list[Any]) -> Array:
    x, starts, ends, axes = inputs
    where = [slice(None)] * x.ndim
    for start, end, axis in zip(starts, ends, axes, strict=True):
        where[int(axis)] = slice(int(start), int(end))
    found: Array = x[tuple(where)]
    return found


def _split(node: ir.Node, inputs: list[Any]) -> list[Array]:
    x, sizes = inputs
    return np.split(x, np.cumsum(sizes)[:-1], axis=_attribute(node, "axis", 0))


def _two(compute: Callable[[Any, Any], Any]) -> Compute:
    return lambda _, inputs: compute(inputs[0], inputs[1])


OPERATORS: dict[str, Compute] = {
    "Add": _two(np.add),
    "And": _two(np.logical_and),
    "Concat": lambda node, inputs: np.concatenate(inputs, axis=_attribute(node, "axis", 0)),
    "DequantizeLinear": _dequantize,
    "Div": _two(np.divide),
    "Gather": lambda node, inputs: np.take(inputs[0], inputs[1], axis=_attribute(node, "axis", 0)),
    "Gelu": _gelu,
    "GreaterOrEqual": _two(np.greater_equal),
    "Less": _two(np.less),
    "MatMul": _two(np.matmul),
    "Max": _two(np.maximum),
    "Mul": _two(np.multiply),
    "QuantizeLinear": _quantize,
    "RMSNormalization": _rms_norm,
    "Reshape": _reshape,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sub": _two(np.subtract),
    "Tanh": lambda _, inputs: np.tanh(inputs[0]),
    "Transpose": lambda node, inputs: np.transpose(inputs[0], _attribute(node, "perm", None)),
    "Unsqueeze": lambda _, inputs: np.expand_dims(inputs[0], tuple(int(axis) for axis in inputs[1])),
    "Where": lambda _, inputs: np.where(inputs[0], inputs[1], inputs[2]),
}
