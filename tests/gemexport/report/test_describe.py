"""What `inspect` says of artefacts, one or a folder of them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

import gemexport
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.report.describe import inspect_path


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
