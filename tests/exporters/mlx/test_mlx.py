"""MLX export: grids pass through unchanged, the config says what mlx-lm reads, and what does not fit is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import regridded, with_grids

from gemexport import demo
from gemexport.exporters import mlx as exporter
from gemexport.exporters.mlx.config import text_config
from gemexport.formats import mlx
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.gemma.model import architecture
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import ArrayTensor
from gemexport.validators.checks.weights import compare

GATE = "model.layers.0.mlp.gate_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def _with(checkpoint: Checkpoint, *tensors: ArrayTensor) -> Checkpoint:
    return replace(checkpoint, tensors={**checkpoint.tensors, **{tensor.name: tensor for tensor in tensors}})


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
@pytest.mark.parametrize("variant", ["4bit", "bf16", "f32"])
def test_every_weight_is_exact(family: str, variant: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(family)
    done: list[int] = []
    export = exporter.export(checkpoint, tmp_path / variant, variant=variant, progress=done.append)
    found = compare(checkpoint.tensors, mlx.tensors(export.path))
    assert not found.missing
    assert not found.unexpected
    assert all(item.exact_fraction == 1.0 for item in found.tensors)
    assert sum(done) == checkpoint.nbytes()
    assert export.notes == []
    assert {file.name for file in export.files} >= {"config.json", "model.safetensors", "tokenizer.json"}
    for name, tensor in mlx.tensors(export.path).items():
        source = checkpoint.tensors[name]
        if variant == "4bit" and source.grid is not None:
            assert tensor.grid is not None
            np.testing.assert_array_equal(tensor.rows(1, 3).codes, source.rows(1, 3).codes)
            np.testing.assert_array_equal(tensor.rows(1, 3).scales, source.rows(1, 3).scales)


def test_same_input_same_bytes(gemma4: Checkpoint, tmp_path: Path) -> None:
    files = [exporter.export(gemma4, tmp_path / str(i)).files for i in range(2)]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_config_says_the_same_decoder_in_the_older_spelling(gemma4: Checkpoint, gemma3: Checkpoint) -> None:
    for checkpoint in (gemma3, gemma4):
        config = text_config(checkpoint)
        assert "per_layer_config" not in config
        assert architecture(config, "x") == checkpoint.architecture


def test_newer_spelling_and_wrapped_decoders_give_the_same_config(tiny_gemma4: Path, tmp_path: Path) -> None:
    expected = text_config(open_checkpoint(tiny_gemma4))
    for name, settings in {"new": {"spelling": "per_layer_config"}, "wrapped": {"wrapped": True}}.items():
        folder = demo.make(tmp_path / name, size="tiny", **settings)  # type: ignore[arg-type]
        config = text_config(open_checkpoint(folder))
        for key in ("head_dim", "global_head_dim", "num_kv_shared_layers", "rope_parameters", "model_type"):
            assert config[key] == expected[key]


@pytest.mark.parametrize(
    ("block", "group"), [(32, 32), (64, 64), (16, None), (8, None)], ids=["32", "a row", "16", "8"]
)
def test_blocks_become_the_widest_group_that_holds_them(
    gemma3: Checkpoint, tmp_path: Path, block: int, group: int | None
) -> None:
    tensor = regridded(gemma3.tensors[GATE], block, 4)
    export = exporter.export(_with(gemma3, tensor), tmp_path / "4bit")
    stored = mlx.tensors(export.path)[GATE]
    found = compare({GATE: tensor}, {GATE: stored}).tensors[0]
    assert found.exact_fraction == 1.0
    if group is None:
        assert stored.grid is None
        assert export.notes == [f"{GATE} is written without its grid: MLX has no group for blocks of {block} weights"]
        assert _config(export.path)["quantization"]["model.layers.0.mlp.gate_proj"] is False
    else:
        assert stored.grid is not None
        assert stored.grid.block == group


def test_group_is_regrouped_within_a_row() -> None:
    assert mlx.group_for(640, 640) == 128
    assert mlx.group_for(96, 96) == 32
    assert mlx.group_for(48, 48) is None


def test_mixed_bits_are_said_by_module(gemma3: Checkpoint, tmp_path: Path) -> None:
    checkpoint = _with(gemma3, regridded(gemma3.tensors[GATE], 32, 2), regridded(gemma3.tensors[UP], 64, 8))
    export = exporter.export(checkpoint, tmp_path / "4bit")
    assert _config(export.path)["quantization"] == {
        "bits": 4,
        "group_size": 32,
        "mode": "affine",
        "model.layers.0.mlp.gate_proj": {"bits": 2, "group_size": 32, "mode": "affine"},
        "model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 64, "mode": "affine"},
    }
    found = compare(checkpoint.tensors, mlx.tensors(export.path))
    assert all(item.exact_fraction == 1.0 for item in found.tensors)


def test_asked_scales_are_rounded_and_noted(gemma3: Checkpoint, tmp_path: Path) -> None:
    checkpoint = _with(gemma3, regridded(gemma3.tensors[GATE], 32, 4, "f32"))
    export = exporter.export(checkpoint, tmp_path / "bf16", scales="bf16")
    assert len(export.notes) == 1
    assert GATE in export.notes[0]
    assert "rounded" in export.notes[0]


def test_default_scales_hold_every_number(gemma3: Checkpoint, tmp_path: Path) -> None:
    for dtype in ("f16", "f32"):
        tensor = regridded(gemma3.tensors[GATE], 32, 4, dtype)
        export = exporter.export(_with(gemma3, tensor), tmp_path / dtype)
        assert export.notes == []
        stored = mlx.tensors(export.path)[GATE]
        np.testing.assert_array_equal(stored.rows(0, 5).scales, tensor.rows(0, 5).scales)


def test_scales_of_rounded_tensors_follow_the_source(tmp_path: Path) -> None:
    checkpoint = with_grids(demo.make(tmp_path / "plain", family="gemma3", size="tiny", rule=None), tmp_path / "grids")
    export = exporter.export(checkpoint, tmp_path / "4bit")
    assert [note.split(maxsplit=1)[1][:42] for note in export.notes] == ["scales are not bf16 numbers and were round"]
    stored = mlx.tensors(export.path)
    assert {tensor.grid.scale_dtype if tensor.grid else tensor.dtype for tensor in stored.values()} == {"bf16"}
    np.testing.assert_array_equal(stored[GATE].rows(0, 9).codes, checkpoint.tensors[GATE].rows(0, 9).codes)


def test_what_mlx_lm_has_no_words_for_is_refused(gemma3: Checkpoint, gemma4: Checkpoint, tmp_path: Path) -> None:
    def changed(checkpoint: Checkpoint, **settings: Any) -> Checkpoint:
        decoder = checkpoint.architecture.model_copy(update=settings)
        return replace(checkpoint, model=replace(checkpoint.model, decoder=decoder))

    layers = gemma3.architecture.layers
    full = next(layer for layer in layers if not layer.sliding)
    uneven = (full.model_copy(update={"index": 0}), *layers[1:])
    strange = (layers[0].model_copy(update={"head_dim": 16}), *layers[1:])
    wide = tuple(
        layer if layer.sliding else layer.model_copy(update={"kv_heads": 2}) for layer in gemma4.architecture.layers
    )
    unsayable = {
        "has a soft cap": changed(gemma3, final_softcap=30.0),
        "repeat one pattern": changed(gemma3, layers=uneven),
        "one attention type that differ": changed(gemma3, layers=strange),
        "more key/value heads": changed(gemma4, layers=wide),
    }
    for problem, checkpoint in unsayable.items():
        with pytest.raises(InputError, match=problem):
            exporter.export(checkpoint, tmp_path / "out")
    with pytest.raises(InputError, match="scales in int4 do not exist"):
        exporter.export(gemma3, tmp_path / "out", scales="int4")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
