"""A run whose steps fail: what is said, and what is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemexport import cli
from gemexport.shared.node import Call, Node


def test_the_log_that_a_message_points_to_is_kept(
    tiny_gemma3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without grids there is no run, and the output folder is new: it stays, with the log."""
    broken = [Node("grids", Call("gemexport.engine.steps:grids", {"no": "argument of its"}))]
    monkeypatch.setattr("gemexport.run.graph", lambda *_: broken)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        cli.main(["gguf", str(tiny_gemma3), "-o", str(out), "--no-validate", "--json"])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("gemexport: the step grids did not succeed: TypeError: ")
    assert said.count("\n") == 1
    log = Path(said.strip().partition("; see ")[2])
    assert log.parent == out / ".gemexport" / "logs"
    assert "Traceback" in log.read_text()
