"""An ONNX artefact's graphs, opened, changed and written back with onnx-ir."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from gemexport.faults.weights import Make, Subject
from gemexport.formats.onnx import graph_files


def graphs(subject: Subject) -> Iterator[tuple[Path, ir.Model]]:
    """The graphs of the artefact; each is written back when the loop goes on."""
    for file in graph_files(subject.path):
        model = ir.load(file)
        yield file, model
        ir.save(model, file)


def changed(edit: Callable[[ir.Graph, Subject], bool], named: str = "departs at") -> Make:
    """A fault by `edit`, which tells whether the graph had what it breaks; ValueError when none had."""

    def fault(subject: Subject) -> str:
        found = [edit(model.graph, subject) for _, model in graphs(subject)]  # all of them, not up to the first
        if not any(found):
            raise ValueError("no graph has what this fault breaks")
        return named

    return fault


def replace(graph: ir.Graph, node: ir.Node, index: int, array: Any) -> None:
    """Give an operator a constant of its own."""
    name = f"{node.name}/fault_{index}"
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.Tensor(array, name=name),
    )  # fmt: skip
    graph.initializers[name] = value
    node.replace_input_with(index, value)
