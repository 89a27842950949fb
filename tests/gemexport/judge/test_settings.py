"""Special tokens, dtype and sizes in an artefact's settings are the checkpoint's, or named with both values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gemexport.exporters import mlx
from gemexport.formats.checkpoint import Checkpoint
from gemexport.judge.settings import setting_differences


@pytest.fixture(scope="module")
def folder(gemma4: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mlx.export(gemma4, tmp_path_factory.mktemp("settings") / "mlx").path


def edited(folder: Path, name: str, **changes: Any) -> Path:
    """A copy of a folder with other values in a JSON file, by dotted keys with a double underscore."""
    copy = folder.with_name(f"{folder.name}-edited")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    said = json.loads((copy / name).read_text("utf-8"))
    for key, value in changes.items():
        part, (*outer, last) = said, key.split("__")
        for step in outer:
            part = part[step]
        part[last] = value
    (copy / name).write_text(json.dumps(said), "utf-8")
    return copy


def said(checkpoint: Checkpoint, path: Path) -> list[str]:
    return [str(fact) for fact in setting_differences(checkpoint, path)]


def test_a_right_artefact_has_none(folder: Path, gemma4: Checkpoint) -> None:
    assert said(gemma4, folder) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bos_token_id": 5}, "bos_token_id is 5, the checkpoint says 2"),
        ({"eos_token_id": 5}, "eos_token_id is 5, the checkpoint says some of "),
        ({"eos_token_id": [1, 5]}, "eos_token_id is 1 or 5, the checkpoint says some of "),
        ({"pad_token_id": 7}, "pad_token_id is 7, the checkpoint says 0"),
        ({"dtype": "float16"}, "dtype is float16, the checkpoint says bfloat16"),
    ],
)
def test_a_setting_of_config_json_is_named(
    changes: dict[str, Any], told: str, folder: Path, gemma4: Checkpoint
) -> None:
    (found,) = said(gemma4, edited(folder, "config.json", **changes))
    assert found.startswith(told)


def test_wider_dtypes_and_fewer_ends_are_no_difference(folder: Path, gemma4: Checkpoint) -> None:
    assert said(gemma4, edited(folder, "config.json", dtype="float32", eos_token_id=1)) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"do_sample": None}, "do_sample is not given (False), the checkpoint says True"),
        ({"do_sample": False}, "do_sample is False, the checkpoint says True"),
        ({"top_k": None}, "top_k is not given (50), the checkpoint says 64"),
        ({"top_p": 0.5}, "top_p is 0.5, the checkpoint says 0.95"),
        ({"temperature": 0.1}, "temperature is 0.1, the checkpoint says 1.0"),
    ],
)
def test_how_tokens_are_chosen_is_compared(
    changes: dict[str, Any], told: str, folder: Path, gemma4: Checkpoint
) -> None:
    assert said(gemma4, edited(folder, "generation_config.json", **changes)) == [f"generation_config.json: {told}"]


def test_the_usual_values_may_be_left_out(folder: Path, gemma4: Checkpoint) -> None:
    copy = edited(folder, "generation_config.json", temperature=1.0, min_p=None, repetition_penalty=1)
    assert said(gemma4, copy) == []
    (copy / "generation_config.json").unlink()
    assert said(gemma4, copy) == []


def test_weights_beside_the_models_are_named(folder: Path, gemma4: Checkpoint) -> None:
    copy = edited(folder, "config.json")
    shutil.copyfile(copy / "model.safetensors", copy / "adapters.safetensors")
    assert said(gemma4, copy) == []
    shutil.copyfile(copy / "model.safetensors", copy / "model-of-before.safetensors")
    (found,) = said(gemma4, copy)
    assert "model-of-before.safetensors, model.safetensors" in found


def test_sizes_of_genai_config_are_compared(gemma4: Checkpoint, tmp_path: Path) -> None:
    export = pytest.importorskip("gemexport.exporters.onnx").export
    own = export(gemma4, tmp_path / "onnx").path
    assert said(gemma4, own) == []
    for changes, told in (
        ({"model__context_length": 10}, "genai_config.json: context_length is 10, the checkpoint says 4096"),
        ({"model__decoder__head_size": 1}, "genai_config.json: decoder.head_size is 1, the checkpoint says 32 or 64"),
        (
            {"model__decoder__num_key_value_heads": 3},
            "genai_config.json: decoder.num_key_value_heads is 3, the checkpoint says 1",
        ),
        ({"model__type": "gemma3_texy"}, "genai_config.json: type is gemma3_texy, the checkpoint says gemma3_text"),
        ({"model__bos_token_id": 9}, "genai_config.json: bos_token_id is 9, the checkpoint says 2"),
        (
            {"search__do_sample": False},
            "genai_config.json: search.do_sample is False, the checkpoint says True",
        ),
        (
            {"search__do_sample": None},
            "genai_config.json: search.do_sample is not given (False), the checkpoint says True",
        ),
        ({"search__max_length": 9999}, "genai_config.json: search.max_length is 9999, the checkpoint says 4096"),
    ):
        assert said(gemma4, edited(own, "genai_config.json", **changes)) == [told]
