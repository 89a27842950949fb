"""What an artefact says of the decoder is compared with the checkpoint, in the format's own words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gemexport.exporters import mlx
from gemexport.formats.activations import Activations, LinearActivations, Quantizer
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.gemma.model import Model
from gemexport.formats.storage.errors import InputError
from gemexport.judge.facts import activation_differences, differences


@pytest.fixture(scope="module")
def folder(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mlx.export(open_checkpoint(tiny_gemma4), tmp_path_factory.mktemp("facts") / "mlx").path


@pytest.fixture
def checkpoint(tiny_gemma4: Path) -> Checkpoint:
    return open_checkpoint(tiny_gemma4)


def changed(checkpoint: Checkpoint, **update: object) -> Model:
    return replace(checkpoint.model, decoder=checkpoint.architecture.model_copy(update=update))


def test_a_right_artefact_says_what_the_checkpoint_says(folder: Path, checkpoint: Checkpoint) -> None:
    assert differences("mlx", folder, checkpoint.model) == ()


def test_a_fact_is_named_with_its_layers_and_both_values(folder: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["full_attention"]["rope_theta"] = 10_000.0
    config["final_logit_softcapping"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [str(fact) for fact in differences("mlx", tmp_path, checkpoint.model)] == [
        "final_logit_softcapping is None, the checkpoint says 30",
        "rope_theta of full_attention is 10000 in layers 2, 4, 7, the checkpoint says 1000000",
    ]


def test_onnxruntime_genai_is_told_of_the_graph_that_is_there(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Of another graph, input or output it raises an error, or starts each token with an empty cache."""
    export = pytest.importorskip("gemexport.exporters.onnx").export
    folder = export(checkpoint, tmp_path / "onnx").path
    assert differences("onnx", folder, checkpoint.model) == ()
    said = json.loads((folder / "genai_config.json").read_text())
    for wrong, fact in (
        ({"filename": "other.onnx"}, "decoder.filename"),
        ({"inputs": {"past_key_names": "past.%d.k"}}, "decoder.inputs.past_key_names"),
        ({"outputs": {"logits": "scores"}}, "decoder.outputs.logits"),
    ):
        decoder = {**said["model"]["decoder"], **wrong}
        (folder / "genai_config.json").write_text(json.dumps({"model": {**said["model"], "decoder": decoder}}))
        found = differences("onnx", folder, checkpoint.model)
        assert [item.name for item in found] == [f"genai_config.json: {fact}"]
    (folder / "genai_config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        differences("onnx", folder, checkpoint.model)


def test_the_config_beside_onnx_graphs_is_the_decoders(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Optimum and transformers.js run the graphs by it."""
    export = pytest.importorskip("gemexport.exporters.onnx").export
    folder = export(checkpoint, tmp_path / "onnx").path
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "max_position_embeddings": 128}))
    assert [item.name for item in differences("onnx", folder, checkpoint.model)] == ["max_position_embeddings"]


def test_the_last_bit_of_f32_is_no_difference(folder: Path, checkpoint: Checkpoint) -> None:
    model = changed(checkpoint, rms_norm_eps=9.9999999e-7)
    assert differences("mlx", folder, model) == ()
    model = changed(checkpoint, rms_norm_eps=1.00001e-6)
    assert [fact.name for fact in differences("mlx", folder, model)] == ["rms_norm_eps"]


def test_a_window_that_no_layer_has_is_nobodys(folder: Path, checkpoint: Checkpoint) -> None:
    wider = changed(checkpoint, sliding_window=9)
    assert [fact.name for fact in differences("mlx", folder, wider)] == ["sliding_window"]


def test_static_scales_are_the_checkpoints(checkpoint: Checkpoint) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    ours = Activations({name: LinearActivations(input=Quantizer(0.5))})
    assert activation_differences(ours, ours) == ()
    assert activation_differences(ours, None) == (), "left out"
    assert activation_differences(None, ours) == (), "the checkpoint has none: they were measured"
    doubled = replace(ours, linears={name: LinearActivations(input=Quantizer(1.0))})
    (fact,) = activation_differences(ours, doubled)
    assert str(fact) == (
        f"the activation quantizer of {name}, input is 8 bits, scale 1, zero point 0, "
        "the checkpoint says 8 bits, scale 0.5, zero point 0"
    )
