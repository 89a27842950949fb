"""In an environment without any extra: a command that needs one says in a line what to do, and nothing else breaks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

WORKS = ("inspect", "--version", "--help")  # with what is required alone


@pytest.mark.slow
def test_every_command_without_extras(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "bare.py"
    spec = importlib.util.spec_from_file_location("bare", path)
    assert spec is not None
    assert spec.loader is not None
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    missing = (tmp_path / "bare" / "bin" / "python", tmp_path)
    assert bare.environment(tmp_path / "bare") == missing[0]
    before = set(tmp_path.iterdir())
    found = list(bare.run(*missing))
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"model", "somebodys.gguf"}
    assert {command.split()[0] for command, _, _ in found} >= {"all", "plan", "validate", "demo", "gguf", "coreml"}
    for command, status, said in found:
        fine = command.startswith(WORKS) and "somebodys" not in command
        assert status == (0 if fine else 2), f"{command}: {said}"
        assert said
        if not fine:
            (line,) = said.splitlines()
            assert line.startswith("gemexport: ")
            assert "pip install" in line or "hf download" in line, command
