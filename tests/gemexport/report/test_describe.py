"""What `inspect` says of single files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gemexport
from gemexport.report.describe import inspect_path


def test_a_graph_by_itself(tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    gemexport.export(tiny_gemma3, out, formats=["onnx"], variants={"onnx": ["int4"]}, validate=False)
    inspect_path(out / "onnx" / "int4" / "model.onnx", as_json=True)
    alone = json.loads(capsys.readouterr().out)
    inspect_path(out / "onnx" / "int4", as_json=True)
    folder = json.loads(capsys.readouterr().out)
    assert (alone["artefact"], alone["format"]) == ("model.onnx", "ONNX")
    assert (alone["parameters"], alone["grids"]) == (folder["parameters"], folder["grids"])
