"""The line that runs an artefact is one that a shell takes, whatever the folder is called."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

import pytest

from gemexport.formats.checkpoint import open_checkpoint


@pytest.mark.parametrize(
    ("module", "variant", "name"),
    [
        ("gguf", "F32", "m.gguf"),
        ("mlx", "f32", "f32"),
        ("onnx", "f32", "f32"),
        ("coreml", "f32", "f32.mlpackage"),
        ("compressed_tensors", "bf16", "bf16"),
    ],
)
def test_a_shell_takes_it(module: str, variant: str, name: str, tiny_gemma3: Path, tmp_path: Path) -> None:
    exporter = pytest.importorskip(f"gemexport.exporters.{module}")
    path = tmp_path / "it's my $HOME" / name
    path.parent.mkdir()
    words = shlex.split(exporter.export(open_checkpoint(tiny_gemma3), path, variant=variant).run, comments=True)
    if module == "compressed_tensors":
        words = [node.value for node in ast.walk(ast.parse(words[-1])) if isinstance(node, ast.Constant)]
    assert str(path / "generate.py" if module == "onnx" else path) in words
