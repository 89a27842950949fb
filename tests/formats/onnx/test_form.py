"""A damaged graph is refused in one line that names the file and the operator or tensor, whatever was damaged."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemexport.exporters import onnx as exporter
from gemexport.formats import onnx
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.onnx.activations import activations
from gemexport.formats.storage.errors import InputError

proto = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def clean(gemma4: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exporter.export(gemma4, tmp_path_factory.mktemp("onnx") / "npu", variant="npu").path


def first(graph: Any, operator: str) -> Any:
    return next(node for node in graph.node if node.op_type == operator)


def attribute(operator: str, name: str, value: object) -> Callable[[Any], None]:
    def damage(graph: Any) -> None:
        node = first(graph, operator)
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, proto.helper.make_attribute(name, value)])

    return damage


def matrix(graph: Any) -> Any:
    return next(each for each in graph.initializer if each.name == "model.layers.0.mlp.up_proj.weight")


def no_outputs(graph: Any) -> None:
    del first(graph, "MatMul").output[:]


def odd_cast(graph: Any) -> None:
    node = first(graph, "Transpose")
    node.op_type = "Cast"
    attribute("Cast", "to", 99)(graph)


def one_input(graph: Any) -> None:
    del first(graph, "MatMul").input[1:]


def strings(graph: Any) -> None:
    matrix(graph).data_type = proto.TensorProto.STRING


def fewer_bytes(graph: Any) -> None:
    tensor = next(each for each in graph.initializer if each.name == "model.norm.weight")
    del tensor.external_data[:]
    tensor.data_location, tensor.raw_data = proto.TensorProto.DEFAULT, b"\0\0\0"


def negative(graph: Any) -> None:
    matrix(graph).dims[0] = -1


def read(path: Path) -> None:
    for tensor in onnx.tensors(path).values():
        tensor.numpy()
    activations(path)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (attribute("DequantizeLinear", "axis", [0.5]), "DequantizeLinear .* axis of type FLOATS, not INT"),
        (odd_cast, "Cast .* to of 99"),
        (attribute("Transpose", "perm", [0, 7]), "Transpose .* perm"),
        (no_outputs, "MatMul .* 0 outputs"),
        (one_input, "MatMul .* 1 inputs"),
        (strings, "up_proj"),
        (fewer_bytes, r"model\.norm\.weight has 3 bytes"),
        (negative, "up_proj"),
    ],
)
def test_what_is_damaged_is_named(damage: Callable[[Any], None], named: str, clean: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(clean, tmp_path / "npu"))
    file = path / "decode.onnx"
    model = proto.load(file, load_external_data=False)
    damage(model.graph)
    file.write_bytes(model.SerializeToString())
    with pytest.raises(InputError) as told:
        read(path)
    assert "decode.onnx" in str(told.value)
    assert re.search(named, str(told.value))
    assert "\n" not in str(told.value)
