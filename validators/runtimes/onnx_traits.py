"""What the operators of ONNX graphs say about how they compute, without running them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemexport.formats.onnx import read_model
from gemexport.validators.runtimes.protocol import Arithmetic

if TYPE_CHECKING:
    import onnx_ir as ir

_ATTRIBUTES = ("accuracy_level", "sliding_window_cache", "local_window_size")


@dataclass(frozen=True)
class Traits:
    """What the operators of an artefact's graphs say about how it runs."""

    arithmetic: Arithmetic
    capacities: dict[str, int]  # positions that a cache of fixed size holds, by the input's name


def _rounding(node: ir.Node) -> Arithmetic:
    """What a QuantizeLinear of activations means: the checkpoint's own int8 scales, or an NPU's unsigned integers."""
    import onnx_ir as ir

    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None or zero.dtype == ir.DataType.INT8:
        return "static-activations"
    return "static-int8" if zero.dtype == ir.DataType.UINT8 else "static-int16"


def traits(files: Sequence[Path]) -> Traits:
    """The traits of the graphs in these files, the one that takes most away first."""
    import onnx_ir as ir

    arithmetics: set[Arithmetic] = set()
    capacities: dict[str, int] = {}
    for file in files:
        graph = read_model(file).graph
        for node in graph:
            if node.op_type == "QuantizeLinear":
                arithmetics.add(_rounding(node))
            numbers = {name: node.attributes.get_int(name, 0) for name in _ATTRIBUTES if name in node.attributes}
            if numbers.get("accuracy_level") == 4:
                arithmetics.add("int8-activations")
            # The runtime drops what has left the window, and wants room for the window from the start.
            if numbers.get("sliding_window_cache"):
                capacities |= {v.name or "": numbers["local_window_size"] for v in node.inputs[3:5] if v is not None}
        if any(output.dtype == ir.DataType.FLOAT16 for output in graph.outputs):
            arithmetics.add("f16")
    order: tuple[Arithmetic, ...] = (
        "static-int8", "static-int16", "int8-activations", "static-activations", "f16"
    )  # fmt: skip
    return Traits(next((kind for kind in order if kind in arithmetics), "f32"), capacities)
