"""What `inspect` says of artefacts, one or a folder of them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

import gemexport
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.registry import recognise
from gemexport.report.describe import inspect_path
from gemexport.report.render import size


def test_a_graph_by_itself_and_a_folder_of_artefacts(
    tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    gemexport.export(tiny_gemma3, out, formats=["gguf", "onnx"], variants={"onnx": ["int4"]}, validate=False)
    inspect_path(out / "onnx" / "int4" / "model.onnx", as_json=True)
    alone = json.loads(capsys.readouterr().out)
    inspect_path(out / "onnx" / "int4", as_json=True)
    folder = json.loads(capsys.readouterr().out)
    assert (alone["artefact"], alone["format"]) == ("model.onnx", "ONNX")
    files = [out / "onnx" / "int4" / name for name in ("model.onnx", "model.onnx.data")]
    assert alone["bytes"] == size(sum(file.stat().st_size for file in files))
    inspect_path(out, as_json=True)
    (gguf, onnx) = json.loads(capsys.readouterr().out)
    assert (gguf["artefact"], onnx) == ("tiny-gemma3-Q4_0.gguf", folder)
    inspect_path(out, as_json=False)
    shown = capsys.readouterr().out
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("artefact")] == [
        "tiny-gemma3-Q4_0.gguf",
        "int4",
    ]
    assert (alone["parameters"], alone["grids"]) == (folder["parameters"], folder["grids"])


def test_a_graph_of_several_is_told_with_the_others(
    tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By itself it has copies of what lies in another."""
    out = tmp_path / "out"
    gemexport.export(tiny_gemma3, out, formats=["onnx"], validate=False)
    inspect_path(out / "onnx" / "npu", as_json=True)
    folder = json.loads(capsys.readouterr().out)
    for name in ("embeddings", "prefill", "decode"):
        inspect_path(out / "onnx" / "npu" / f"{name}.onnx", as_json=True)
        facts = json.loads(capsys.readouterr().out)
        assert facts.pop("graphs").startswith(f"{name}.onnx, one model with ")
        assert facts == folder


def test_a_folder_of_artefacts_is_none_and_says_what_it_holds(tiny_gemma3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    gemexport.export(tiny_gemma3, out, formats=["gguf", "onnx"], validate=False)
    with pytest.raises(InputError, match=r"out: holds gguf/tiny-gemma3-Q4_0\.gguf, onnx/int4, onnx/npu; give the path"):
        recognise(out)
    with pytest.raises(InputError, match=r"onnx: holds int4, npu; give the path of one"):
        recognise(out / "onnx")


def test_inspect_takes_a_file_of_weights(tiny_gemma3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_path(tiny_gemma3 / "model.safetensors", as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["weights"], facts["format"]) == ("model.safetensors", "safetensors")
    assert [grid["grid"] for grid in facts["grids"]] == ["BF16"]
    assert facts["grids"][0]["weights"] == sum(
        math.prod(t.shape) for t in open_checkpoint(tiny_gemma3).tensors.values()
    )


@pytest.mark.parametrize("part", ["", "gguf", "mlx"])
def test_inspect_takes_folders_of_artefacts_wherever_they_are_from(
    part: str, tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the Action uploads has no work folder, and a part of it may have been copied."""
    gemexport.export(tiny_gemma3, tmp_path / "out", formats=["gguf", "mlx"], validate=False)
    shutil.rmtree(tmp_path / "out" / ".gemexport")
    (tmp_path / "out" / "gguf" / "notes.txt").touch()
    inspect_path(tmp_path / "out" / part, as_json=True)
    facts = json.loads(capsys.readouterr().out)
    expected = {"": ["GGUF", "MLX"], "gguf": ["GGUF"], "mlx": ["MLX"]}[part]
    assert [one["format"] for one in facts] == expected
