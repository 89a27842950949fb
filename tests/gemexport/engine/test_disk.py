"""Disk space is planned in bytes, and looked at before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemexport import cli
from gemexport.engine.disk import artifact_bytes, replaced, required
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.shared.node import Call, Node, Outcome

CALL = Call("os:getpid", {})


def node(name: str, writes: int, scratch: int) -> Node:
    return Node(name, CALL, writes=writes, scratch=scratch)


@pytest.mark.parametrize(("jobs", "expected"), [(1, 600 + 50), (2, 600 + 90), (9, 600 + 100)])
def test_what_stays_adds_up_and_scratch_does_as_far_as_steps_run_side_by_side(jobs: int, expected: int) -> None:
    nodes = [node("a", 100, 10), node("b", 200, 50), node("c", 300, 40)]
    assert required(nodes, jobs) == expected


@pytest.mark.parametrize(("size", "expected"), [(50, (0, 50)), (100, (0, 100)), (130, (30, 100))])
def test_what_lies_there_is_replaced(size: int, expected: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "weights").write_bytes(bytes(100))
    assert replaced(size, tmp_path / "old") == expected
    assert replaced(size, tmp_path / "old" / "weights") == expected
    assert replaced(size, tmp_path / "new") == (size, 0)


def test_plain_artefacts_take_their_dtype(tiny_gemma3: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma3)
    assert artifact_bytes(checkpoint.tensors, "bf16") == 2 * checkpoint.architecture.parameters()


@pytest.mark.parametrize("command", ["gguf", "validate"])
def test_without_room_nothing_starts(
    command: str, tiny_gemma3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object) -> dict[str, Outcome]:
        pytest.fail("a step was started")

    monkeypatch.setattr("gemexport.engine.scheduler.Scheduler.run", never)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12_345))
    out, artifact = tmp_path / "out", tmp_path / "model.gguf"
    artifact.touch()
    given: Sequence[str] = ("-o", str(out)) if command == "gguf" else (str(artifact),)
    with pytest.raises(SystemExit) as ended:
        cli.main([command, str(tiny_gemma3), *given])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "has 12.3 KB free, and this takes about" in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == [artifact]
