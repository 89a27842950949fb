"""Outputs that are there whole or not at all, and locks between processes."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import Timeout

from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import LOCK, abandon, locked, write_whole

HOLDS = """
import sys
from pathlib import Path
from gemexport.formats.storage.files import abandon, locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_one_processs_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-P", "-c", HOLDS, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(Timeout), locked(path, wait=False):
            pass
        other.stdin.close()
        with locked(path):  # waits for the other's end
            pass
    assert other.returncode == 0


@pytest.mark.parametrize("renamed", [False, True])
def test_what_a_killed_process_left_is_abandoned(renamed: bool, tmp_path: Path) -> None:
    """It may have ended between the two renames that replace a folder."""
    path = tmp_path / "4bit"
    before = tmp_path / ("4bit.old.partial" if renamed else "4bit")
    for folder, text in ((before, "whole"), (tmp_path / "4bit.partial", "half")):
        folder.mkdir()
        (folder / "weights").write_text(text)
    abandon(path)
    assert list(tmp_path.iterdir()) == [path]
    assert (path / "weights").read_text() == "whole"
    abandon(path)
    assert (path / "weights").read_text() == "whole"


def test_a_folder_that_two_want_at_once_is_made_once(tmp_path: Path) -> None:
    made, (old, wanted) = list[Path](), (tmp_path / "old", tmp_path / "new")
    old.mkdir()

    def fill(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.05)
        (folder / "file").write_text("whole")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write_whole(wanted, fill), range(4)))
    assert len(made) == 1
    assert (wanted / "file").read_text() == "whole"
    assert {path.name for path in tmp_path.iterdir()} == {"new", LOCK}


def test_a_folder_that_cannot_be_filled_is_not_there(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise InputError("x", "is broken", "mend it")

    with pytest.raises(InputError):
        write_whole(tmp_path / "new", fill)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
