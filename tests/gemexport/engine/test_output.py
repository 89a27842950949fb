"""Work folders beside an artefact: whose they are, and when they go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemexport.engine.output import LOCK, work_beside
from gemexport.formats.storage.errors import InputError

# Works beside the artefact that it is given, until it is killed or its input ends.
WORKS = """
import sys
from pathlib import Path
from gemexport.engine.output import work_beside
with work_beside(Path(sys.argv[1])) as work:
    (work / "logits").write_bytes(bytes(1000))
    print(work, flush=True)
    sys.stdin.read()
"""


def long_ago(folder: Path) -> None:
    os.utime(folder, (1, 1))


def test_it_goes_when_the_block_ends(tmp_path: Path) -> None:
    with work_beside(tmp_path / "model.gguf") as work:
        assert work.parent == tmp_path
        (work / "logits").mkdir()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("killed", [True, False])
def test_what_a_killed_process_left_goes_with_the_next(killed: bool, tmp_path: Path) -> None:
    artifact = tmp_path / "model.gguf"
    command = [sys.executable, "-P", "-c", WORKS, str(artifact)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        if killed:
            other.kill()
            other.wait()
        long_ago(left)
        with work_beside(artifact) as work:
            assert {work} | (set() if killed else {left}) == set(tmp_path.iterdir())
        other.stdin.close()
    assert not list(tmp_path.iterdir())


def test_one_that_was_just_made_stays(tmp_path: Path) -> None:
    """Its maker has not locked it yet."""
    just = tmp_path / ".gemexport-just"
    just.mkdir()
    with work_beside(tmp_path / "model.gguf"):
        assert just.is_dir()
    long_ago(just)
    (just / LOCK).touch()
    long_ago(just)
    with work_beside(tmp_path / "model.gguf"):
        assert not just.exists()


def test_beside_what_cannot_be_written_it_is_where_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    writable = {here}
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) in writable)
    with work_beside(there / "model.gguf") as work:
        assert work.parent == here
    writable.clear()
    with pytest.raises(InputError, match="cannot be written, nor can the current folder"), work_beside(there / "model"):
        pass
