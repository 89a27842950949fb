"""ONNX exports hold the source's codes, in every layout; and an NPU's graphs keep to what an NPU compiler takes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.tensor import ArrayTensor, Grid, Tensor, expand, narrowest, round_to

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
export = pytest.importorskip("gemexport.exporters.onnx").export
tensors = pytest.importorskip("gemexport.formats.onnx").tensors

VARIANTS = ("int4", "npu", "f32")


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    found: Checkpoint = request.getfixturevalue(request.param)
    return found


def regridded(tensor: Tensor, bits: int, block: int, dtype: str = "f16") -> ArrayTensor:
    """The same tensor on another grid: `bits` bits, a scale for `block` weights."""
    values = tensor.numpy()
    random = np.random.default_rng(len(tensor.name) + tensor.shape[0])
    half = 1 << (bits - 1)
    codes = random.integers(-half, half, values.shape).astype(np.int8)
    scales = round_to(
        random.uniform(0.5, 1.5, (values.shape[0], values.shape[1] // block)).astype(np.float32) / 64, dtype
    )
    grid = Grid(bits, block, narrowest(scales), lossless=True)
    return ArrayTensor(tensor.name, codes * expand(scales, block), "f32", codes, scales, grid)


def same(checkpoint: Checkpoint, path: Path) -> None:
    found = tensors(path)
    assert set(found) == set(checkpoint.tensors)
    for name, wanted in checkpoint.tensors.items():
        values = found[name].numpy()
        assert values.shape == wanted.shape
        assert np.array_equal(round_to(values, wanted.dtype), wanted.numpy()), name


def graphs(path: Path) -> dict[str, Any]:
    return {file.stem: onnx.load(file, load_external_data=False) for file in sorted(path.glob("*.onnx"))}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_is_read_back_and_the_bytes_are_the_same_each_time(
    checkpoint: Checkpoint, tmp_path: Path, variant: str
) -> None:
    done: list[int] = []
    first = export(checkpoint, tmp_path / "a" / variant, variant=variant, progress=done.append)
    second = export(checkpoint, tmp_path / "b" / variant, variant=variant)
    assert (first.notes, first.variant) == ([], variant)
    assert first.files == sorted((tmp_path / "a" / variant).iterdir())
    same(checkpoint, first.path)
    assert contents(first.path) == contents(second.path)
    matrices = [tensor for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2]
    assert sum(done) == sum(2 * tensor.shape[0] * tensor.shape[1] for tensor in matrices)


def test_grids_pass_through(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for variant in ("int4", "npu"):
        found = tensors(export(checkpoint, tmp_path / variant, variant=variant).path)
        for name, wanted in checkpoint.tensors.items():
            if wanted.grid is not None:
                assert found[name].grid is not None
                assert np.array_equal(found[name].rows(1, 9).grid()[0], wanted.rows(1, 9).grid()[0])


@pytest.mark.parametrize("variant", ["int4", "npu"])
def test_other_grids(checkpoint: Checkpoint, tmp_path: Path, variant: str) -> None:
    """Every width and block, a whole row (64) too, and scales that f16 cannot hold.

    What ONNX Runtime has no block for stays as it is, and says so.
    """
    grids = [(bits, block, dtype) for bits in (2, 4, 8) for block, dtype in ((16, "f16"), (64, "f32"), (8, "f16"))]
    names = [name for name, t in checkpoint.tensors.items() if len(t.shape) == 2 and t.shape[1] == 64]
    names = [names[0], *names[1:][-len(grids) + 1 :]]
    changed = {name: regridded(checkpoint.tensors[name], *grid) for name, grid in zip(names, grids, strict=True)}
    other = replace(checkpoint, tensors={**checkpoint.tensors, **changed})
    made = export(other, tmp_path / variant, variant=variant)
    assert len(made.notes) == (3 if variant == "int4" else 0)
    same(other, made.path)


def test_tensors_without_a_grid_stay_in_their_own_dtype(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Also the tied embedding, once for both of its uses where one layout serves them."""
    plain = open_checkpoint(checkpoint.path)
    for variant in VARIANTS:
        made = export(plain, tmp_path / variant, variant=variant)
        same(plain, made.path)
        assert tensors(made.path)["model.embed_tokens.weight"].dtype == "bf16"


def test_a_tied_head_is_stored_once_for_onnx_runtime(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = graphs(export(checkpoint, tmp_path / "int4").path)["model"]
    places = {
        item.name: {entry.key: entry.value for entry in item.external_data}
        for item in model.graph.initializer
        if item.name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    assert len(places) == 2
    assert places["model.embed_tokens.weight"] == places["lm_head.weight"]


def test_an_npus_graphs_are_standard_and_static(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = export(checkpoint, tmp_path / "npu", variant="npu", context=64, prefill=16).path
    made = graphs(path)
    assert set(made) == {"embeddings", "prefill", "decode"}
    for name, model in made.items():
        assert {node.domain for node in model.graph.node} == {""}
        onnx.checker.check_model(str(path / f"{name}.onnx"), full_check=True)
    for name, length in (("prefill", 16), ("decode", 1)):
        graph = made[name].graph
        sizes = {
            value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        }
        assert all(size > 0 for shape in sizes.values() for size in shape)
        assert sizes["position_ids"] == [1, length]
        assert sizes["logits"] == [1, length, checkpoint.architecture.vocab_size]
        for layer in checkpoint.architecture.layers:
            shape = sizes.get(f"past_key_values.{layer.index}.key")
            assert shape == sizes.get(f"present.{layer.index}.key")
            assert (shape is not None) == layer.owns_cache
            if shape is not None:
                length = checkpoint.architecture.sliding_window if layer.sliding else 64
                assert shape == [1, layer.kv_heads, length, layer.head_dim]
    kinds = {item.data_type for item in made["decode"].graph.initializer}
    assert onnx.TensorProto.INT4 in kinds


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_rows_are_masked_before_they_are_shifted(checkpoint: Checkpoint, tmp_path: Path, bits: int) -> None:
    """OpenVINO rounds what a shift drops. Folders that were written shift first, and are read back all the same."""
    ort = pytest.importorskip("onnxruntime")
    name = "model.embed_tokens.weight"
    made = replace(checkpoint, tensors={**checkpoint.tensors, name: regridded(checkpoint.tensors[name], bits, 32)})
    path = export(made, tmp_path / "npu", variant="npu", context=64, prefill=16).path
    ids = {"input_ids": np.arange(500)[None]}
    expected = ort.InferenceSession(path / "embeddings.onnx").run(None, ids)
    model = onnx.load(path / "embeddings.onnx", load_external_data=False)
    producer = {node.output[0]: node for node in model.graph.node}
    values = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer if item.raw_data}
    shifts = [node for node in model.graph.node if node.op_type == "BitShift"]
    assert len(shifts) >= 8 // bits - 1
    for shift in shifts:
        masked = producer[shift.input[0]]
        assert masked.op_type == "BitwiseAnd"
        mask, places = (int(values[node.input[1]]) for node in (masked, shift))
        low = mask >> places
        assert low in (3, 15)
        assert low << places == mask
        before, after = shift.input[1], next(name for name, value in values.items() if np.array_equal(value, low))
        masked.op_type, shift.op_type = "BitShift", "BitwiseAnd"
        masked.input[1], shift.input[1] = before, after
        masked.attribute.append(shift.attribute[0])
        del shift.attribute[:]
    onnx.save(model, path / "embeddings.onnx")
    for found, wanted in zip(ort.InferenceSession(path / "embeddings.onnx").run(None, ids), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    same(made, path)


def test_the_npus_graphs_share_their_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    made = graphs(export(checkpoint, tmp_path / "npu", variant="npu").path)
    prefill, decode = (
        {item.name: [(e.key, e.value) for e in item.external_data] for item in made[name].graph.initializer}
        for name in ("prefill", "decode")
    )
    assert {name: place for name, place in prefill.items() if place} == {n: p for n, p in decode.items() if p}


def test_the_configuration_counts_the_layers_that_have_a_cache(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = export(checkpoint, tmp_path / "int4").path
    config = json.loads((path / "genai_config.json").read_text("utf-8"))["model"]
    owners = [layer for layer in checkpoint.architecture.layers if layer.owns_cache]
    assert config["decoder"]["num_hidden_layers"] == len(owners)
    inputs = {value.name for value in graphs(path)["model"].graph.input}
    names = config["decoder"]["inputs"]
    assert {names["past_key_names"] % index for index in range(len(owners))} <= inputs
    assert (path / "tokenizer.json").read_bytes() == (checkpoint.path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_decoders_config_lies_beside_the_graphs(checkpoint: Checkpoint, tmp_path: Path, variant: str) -> None:
    """Optimum and transformers.js do not start without it; of a multimodal model it is the part that the graphs are."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint.path, folder)
    own = json.loads((folder / "config.json").read_text("utf-8"))
    family = own["model_type"].removesuffix("_text")
    whole = {"model_type": family, "architectures": ["X"], "text_config": own, "vision_config": {}}
    for config in (own, whole):
        (folder / "config.json").write_text(json.dumps(config))
        path = export(open_checkpoint(folder), tmp_path / config["model_type"], variant=variant).path
        found = json.loads((path / "config.json").read_text("utf-8"))
        assert found == {**own, "architectures": [f"{family.capitalize()}ForCausalLM"]}


def test_answers_end_and_tokens_are_chosen_as_generation_config_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """onnxruntime-genai reads genai_config.json alone: all ends go there, and the template's end of a turn."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint.path, folder)
    settings = {"do_sample": True, "eos_token_id": [1, 106], "top_k": 64, "top_p": 0.95, "cache_implementation": "x"}
    found = []
    for said in (settings, {"top_k": 64}):
        (folder / "generation_config.json").write_text(json.dumps(said))
        path = export(open_checkpoint(folder), tmp_path / str(len(found))).path
        found.append(json.loads((path / "genai_config.json").read_text("utf-8")))
    assert [said["model"]["eos_token_id"] for said in found] == [[1, 106, 6], [1, 6]]
    kept = [{key: said["search"].get(key) for key in ("do_sample", "top_k", "top_p")} for said in found]
    assert kept == [{"do_sample": True, "top_k": 64, "top_p": 0.95}, {"do_sample": False, "top_k": None, "top_p": None}]


def test_a_file_in_the_way_is_the_users_to_mend(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from gemexport.formats.storage.errors import InputError

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        export(checkpoint, tmp_path / "file" / "int4")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
