"""compressed-tensors export: grids pass through unchanged, under a config that the library itself would write."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import regridded, with_grids

from gemexport import demo
from gemexport.exporters import compressed_tensors as exporter
from gemexport.formats import compressed_tensors
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.names import FINAL_NORM
from gemexport.formats.tensor import ArrayTensor, Grid, Tensor, expand
from gemexport.judge.settings import setting_differences
from gemexport.validators.checks.weights import compare

EMBEDDINGS = "model.embed_tokens.weight"
PER_LAYER = "model.embed_tokens_per_layer.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def _with(checkpoint: Checkpoint, *tensors: ArrayTensor) -> Checkpoint:
    return replace(checkpoint, tensors={**checkpoint.tensors, **{tensor.name: tensor for tensor in tensors}})


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
@pytest.mark.parametrize(
    "options", [{}, {"pack_embeddings": True}, {"variant": "bf16"}], ids=["w4a16", "embeddings", "bf16"]
)
def test_every_weight_is_exact(
    family: str, options: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(family)
    done: list[int] = []
    export = exporter.export(checkpoint, tmp_path / "out", progress=done.append, **options)
    stored = compressed_tensors.tensors(export.path)
    found = compare(checkpoint.tensors, stored)
    assert not found.missing
    assert not found.unexpected
    assert all(item.exact_fraction == 1.0 for item in found.tensors)
    assert sum(done) == checkpoint.nbytes()
    packed = {name for name, tensor in stored.items() if tensor.grid is not None}
    grids = {name for name, tensor in checkpoint.tensors.items() if tensor.grid is not None}
    expected = {"w4a16": grids - {EMBEDDINGS, PER_LAYER}, "bf16": set()}[export.variant]
    assert packed == (grids if options.get("pack_embeddings") else expected)
    for name in packed:
        np.testing.assert_array_equal(stored[name].rows(2, 5).codes, checkpoint.tensors[name].rows(2, 5).codes)


def test_same_input_same_bytes(gemma4: Checkpoint, tmp_path: Path) -> None:
    files = [exporter.export(gemma4, tmp_path / str(i)).files for i in range(2)]
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_unpacked_embeddings_are_noted(gemma4: Checkpoint, tmp_path: Path) -> None:
    notes = exporter.export(gemma4, tmp_path / "out").notes
    assert [note.split()[0] for note in notes] == [EMBEDDINGS, PER_LAYER]
    notes = exporter.export(gemma4, tmp_path / "packed", pack_embeddings=True).notes
    assert notes == [f"{EMBEDDINGS} is packed and the head too; vLLM does not load that (--no-pack-embeddings)"]


def test_what_vllm_loads_has_its_line_too(gemma4: Checkpoint, tmp_path: Path) -> None:
    """A comment to the shell, so that the line runs as it stands."""
    path = tmp_path / "my out"
    ours, theirs = exporter.export(gemma4, path).run.split("  # or: ")
    assert ours.startswith("python -c ")
    assert theirs == f"vllm serve {shlex.quote(str(path))}"
    assert "vllm serve" not in exporter.export(gemma4, path, pack_embeddings=True).run


@pytest.mark.parametrize("pack_embeddings", [False, True])
def test_config_is_what_the_library_writes(gemma3: Checkpoint, tmp_path: Path, pack_embeddings: bool) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    checkpoint = _with(gemma3, regridded(gemma3.tensors[GATE], 16, 4), regridded(gemma3.tensors[UP], 64, 8))
    written = _config(exporter.export(checkpoint, tmp_path / "out", pack_embeddings=pack_embeddings).path)
    ours = written["quantization_config"]
    assert ours.pop("dequantize") is pack_embeddings
    theirs = quantization.QuantizationConfig.model_validate(ours).model_dump(mode="json")
    assert {key: theirs[key] for key in ours} == ours
    assert {key for key in theirs if theirs[key] is not None} <= set(ours)
    assert written["dtype"] == "bfloat16"


def test_mixed_schemes_are_said_by_module(gemma3: Checkpoint, tmp_path: Path) -> None:
    narrow, row = regridded(gemma3.tensors[GATE], 16, 4), regridded(gemma3.tensors[UP], 64, 8)
    checkpoint = _with(gemma3, narrow, row)
    export = exporter.export(checkpoint, tmp_path / "out")
    groups = _config(export.path)["quantization_config"]["config_groups"]
    said = {
        tuple(group["targets"]): (group["weights"]["num_bits"], group["weights"]["strategy"])
        for group in groups.values()
    }
    assert said == {
        ("Linear",): (4, "group"),
        ("model.layers.0.mlp.gate_proj",): (4, "group"),
        ("model.layers.0.mlp.up_proj",): (8, "channel"),
    }
    found = compare(checkpoint.tensors, compressed_tensors.tensors(export.path))
    assert all(item.exact_fraction == 1.0 for item in found.tensors)
    # Unpacking while loading knows one scheme, so what differs from it is left unpacked.
    export = exporter.export(checkpoint, tmp_path / "packed", pack_embeddings=True)
    assert [note.split()[0] for note in export.notes] == [EMBEDDINGS, GATE, UP]
    assert compressed_tensors.tensors(export.path)[GATE].grid is None
    ignored = _config(export.path)["quantization_config"]["ignore"]
    assert ignored == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "lm_head"]


def _from_codes(like: Tensor, block: int, bits: int) -> ArrayTensor:
    """A tensor as a reader makes it of codes and scales in f32: what they mean are no 16-bit numbers."""
    (out, width), stream = like.shape, np.random.default_rng(bits)
    codes = stream.integers(-(1 << (bits - 1)), 1 << (bits - 1), (out, width)).astype(np.int8)
    scales = stream.uniform(0.001, 0.1, (out, width // block)).astype(np.float32)
    grid = Grid(bits, block, "f32", lossless=True)
    return ArrayTensor(like.name, codes * expand(scales, block), "f32", codes, scales, grid)


@pytest.mark.parametrize(
    ("bits", "asked", "form"),
    [
        (4, None, "pack-quantized"),  # the scheme of the linears: one that transformers can unpack while it loads
        (2, None, "int-quantized"),
        (2, True, "pack-quantized"),  # one that is the head as well has them unpacked early: wider codes hold these
        (2, False, None),
        (4, False, None),
    ],
)
def test_embeddings_that_were_read_from_codes_keep_them(
    gemma4: Checkpoint, tmp_path: Path, bits: int, asked: bool | None, form: str | None
) -> None:
    embedding = _from_codes(gemma4.tensors[PER_LAYER], 32, bits)
    checkpoint = _with(gemma4, embedding, _from_codes(gemma4.tensors[EMBEDDINGS], 32, 4))
    export = exporter.export(checkpoint, tmp_path / "out", pack_embeddings=asked)
    stored = compressed_tensors.tensors(export.path)
    settings = _config(export.path)["quantization_config"]
    module = PER_LAYER.removesuffix(".weight")
    forms = [group["format"] for group in settings["config_groups"].values() if module in group["targets"]]
    assert forms == ([] if form is None else [form])
    if form is not None:
        assert settings["dequantize"] is (form == "pack-quantized")
        np.testing.assert_array_equal(stored[PER_LAYER].rows(3, 9).codes, embedding.rows(3, 9).codes)
    assert all(item.exact_fraction == 1.0 for item in compare(checkpoint.tensors, stored).tensors)
    assert (stored[EMBEDDINGS].grid is not None) is bool(asked), "one that is the head too"


def test_several_schemes_with_wide_scales_make_a_model_in_f32(gemma3: Checkpoint, tmp_path: Path) -> None:
    """Unpacking while loading holds wide scales, and one scheme: in float32 there is no need to."""
    wide = [_from_codes(gemma3.tensors[name], 32, bits) for name, bits in ((GATE, 4), (UP, 8))]
    export = exporter.export(_with(gemma3, *wide), tmp_path / "out")
    written = _config(export.path)
    assert (written["dtype"], written["quantization_config"]["dequantize"]) == ("float32", False)
    stored = compressed_tensors.tensors(export.path)
    for tensor in wide:
        np.testing.assert_array_equal(stored[tensor.name].rows(0, 9).codes, tensor.rows(0, 9).codes)
        np.testing.assert_array_equal(stored[tensor.name].rows(0, 9).scales, tensor.rows(0, 9).scales)
    export = exporter.export(_with(gemma3, wide[0]), tmp_path / "one")
    written = _config(export.path)
    assert (written["dtype"], written["quantization_config"]["dequantize"]) == ("bfloat16", True)


def test_wider_blocks_join_the_common_one(gemma3: Checkpoint, tmp_path: Path) -> None:
    checkpoint = _with(gemma3, regridded(gemma3.tensors[GATE], 64, 4))
    export = exporter.export(checkpoint, tmp_path / "out")
    assert len(_config(export.path)["quantization_config"]["config_groups"]) == 1
    found = compare(checkpoint.tensors, compressed_tensors.tensors(export.path))
    assert all(item.exact_fraction == 1.0 for item in found.tensors)


def test_scales_of_rows_are_channels(gemma3: Checkpoint, tmp_path: Path) -> None:
    grids = [tensor for tensor in gemma3.tensors.values() if tensor.grid is not None]
    checkpoint = _with(gemma3, *(regridded(tensor, tensor.shape[1], 4) for tensor in grids))
    export = exporter.export(checkpoint, tmp_path / "out")
    groups = _config(export.path)["quantization_config"]["config_groups"]
    assert [group["weights"]["strategy"] for group in groups.values()] == ["channel"]
    found = compare(checkpoint.tensors, compressed_tensors.tensors(export.path))
    assert all(item.exact_fraction == 1.0 for item in found.tensors)


def test_scales_that_loaders_would_round_are_stored_wide(tmp_path: Path) -> None:
    checkpoint = with_grids(demo.make(tmp_path / "model", family="gemma3", size="tiny", rule="f16"), tmp_path / "grids")
    export = exporter.export(checkpoint, tmp_path / "out")
    assert _config(export.path)["quantization_config"]["dequantize"] is True
    stored = compressed_tensors.tensors(export.path)
    assert stored[GATE].dtype == "f32"
    np.testing.assert_array_equal(stored[GATE].rows(0, 9).scales, checkpoint.tensors[GATE].rows(0, 9).scales)


@pytest.mark.parametrize(("asked", "told"), [("bfloat16", "float32"), ("float16", "float16"), (None, "float32")])
def test_weights_in_f16_are_computed_with_in_f32(asked: str | None, told: str, tmp_path: Path) -> None:
    """Loaders go by the config, whatever the weights are stored in: bf16 would round them, f16 hold no hidden state."""
    model = demo.make(tmp_path / "model", family="gemma3", size="tiny", dtype="f16")
    config = _config(model)
    (model / "config.json").write_text(json.dumps({**config, "dtype": asked}))
    checkpoint = with_grids(model, tmp_path / "grids")
    assert checkpoint.tensors[FINAL_NORM].dtype == "f16"
    export = exporter.export(checkpoint, tmp_path / "out")
    assert _config(export.path)["dtype"] == told
    assert compressed_tensors.tensors(export.path)[FINAL_NORM].dtype == "f16"
    assert setting_differences(checkpoint, export.path) == ()


def test_scales_of_rounded_tensors_follow_the_source(tmp_path: Path) -> None:
    checkpoint = with_grids(demo.make(tmp_path / "plain", family="gemma3", size="tiny", rule=None), tmp_path / "grids")
    export = exporter.export(checkpoint, tmp_path / "out")
    assert "scales are not bf16 numbers and were rounded" in export.notes[-1]
    grid = compressed_tensors.tensors(export.path)[GATE].grid
    assert grid is not None
    assert grid.scale_dtype == "bf16"


def test_decoder_of_a_multimodal_checkpoint_comes_out_alone(tmp_path: Path) -> None:
    model = demo.make(tmp_path / "model", size="tiny", wrapped=True)
    checkpoint = with_grids(model, tmp_path / "grids")
    config = _config(exporter.export(checkpoint, tmp_path / "out").path)
    assert config["model_type"] == "gemma4_text"
    assert config["architectures"] == ["Gemma4ForCausalLM"]
    assert "vision_config" not in config
