"""What `inspect` says of artefacts, one or a folder of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gemexport
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
