"""A graph that makes one vector of a text: what is wrong in it moves vectors by more than two right programs differ."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from gemexport import demo
from gemexport.exporters import onnx
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.judge.vectors import vector_limit
from gemexport.validators.checks.distance import Distance
from gemexport.validators.reference import reference
from gemexport.validators.runtimes.onnxruntime import load

TEXTS = [[2, *range(30, 30 + length), 1] for length in (3, 9, 40)]
Judged = Callable[[Callable[[ir.Model], None]], Distance]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """What a graph is judged after a change to it."""
    place = tmp_path_factory.mktemp("encoder")
    checkpoint = open_checkpoint(demo.make(place / "model", family="embeddinggemma", size="tiny"))
    onnx.export(checkpoint, place / "onnx", variant="f32")
    computed = reference(checkpoint.text_config, checkpoint.tensors, embedder=checkpoint.model.embedder)
    wanted = [computed.logits(tokens) for tokens in TEXTS]

    def judge(change: Callable[[ir.Model], None]) -> Distance:
        model, changed, found = ir.load(place / "onnx" / "model.onnx"), place / "changed", Distance()
        change(model)
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(place / "onnx", changed)
        ir.save(model, changed / "model.onnx")
        runtime: Any = load(changed, threads=1, context=64)
        for tokens, vector in zip(TEXTS, wanted, strict=True):
            found.add(vector, runtime.vector(tokens), tokens)
        return found

    return judge


def constant(operator: str, value: Any, above: str | None = None) -> Callable[[ir.Model], None]:
    """Give the second input of every such operator, or of those whose first one `above` made, another value."""

    def change(model: ir.Model) -> None:
        for number, node in enumerate(list(model.graph)):
            source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
            if node.op_type == operator and (above is None or (source is not None and source.op_type == above)):
                name, data = f"/changed/{number}", np.asarray(value)
                stored = ir.Value(name=name, const_value=ir.tensor(data, name=name), shape=ir.Shape(data.shape),
                                  type=ir.TensorType(ir.DataType.from_numpy(data.dtype)))  # fmt: skip
                model.graph.register_initializer(stored)
                node.replace_input_with(1, stored)

    return change


def test_a_right_graph_is_within_the_bound(judged: Judged) -> None:
    found = judged(lambda model: None)
    assert found.distance_mean <= vector_limit(None)
    assert found.error_mean < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        constant("Greater", np.int64(5)),  # the window reaches 4 positions either way
        constant("Greater", np.int64(3)),
        constant("Less", np.float32(-1)),  # positions without a token are seen
    ],
    ids=["wider", "narrower", "filled"],
)
def test_a_wrong_mask_moves_vectors(judged: Judged, change: Callable[[ir.Model], None]) -> None:
    assert judged(change).distance_mean > 100 * vector_limit(None)


def test_a_vector_of_another_length_is_an_error(judged: Judged) -> None:
    found = judged(constant("Max", np.float32(100), above="ReduceL2"))  # divided by 100, not by its length
    assert found.distance_mean <= vector_limit(None)
    assert found.error_mean > 0.1
