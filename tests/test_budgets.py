"""Seconds by group of tests are told at the end of a run, and what is over its budget loudly; nothing fails for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import time
import pytest

def test_sleeps():
    time.sleep(0.6)

@pytest.mark.slow
def test_sleeps_longer():
    time.sleep(0.1)
"""
SETTINGS = """
[pytest]
markers = slow: takes long
testpaths = tests
addopts = -q -n auto --import-mode=importlib
budgets =
    formats 0.5 9000
    runs 9000 9000
"""


def told(folder: Path, *arguments: str) -> str:
    """What pytest prints, in two processes if it is left to it."""
    (folder / "tests" / "formats").mkdir(parents=True, exist_ok=True)
    for place in ("tests", "tests/formats"):
        (folder / place / "test_it.py").write_text(TESTS)
    (folder / "pytest.ini").write_text(SETTINGS)
    shutil.copyfile(ROOT / "conftest.py", folder / "conftest.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("processes", [(), ("-n0",)])
def test_seconds_by_group(processes: tuple[str, ...], tmp_path: Path) -> None:
    printed = told(tmp_path, *processes)
    rows = {match[1]: match for match in re.finditer(r"^(\w+, \w+) +(\d+) +\d+ +\d+(.*)$", printed, re.MULTILINE)}
    assert set(rows) == {"formats, fast", "formats, slow", "runs, fast", "runs, slow"}
    assert all(match[2] == "1" for match in rows.values())
    # It sleeps for longer than it may; the others have hours.
    assert [name for name, match in rows.items() if match[3].strip() == "OVER BUDGET"] == ["formats, fast"]
    assert re.search(r"^all +4 +\d+$", printed, re.MULTILINE)


def test_files_are_run_in_one_process_and_without_a_table(tmp_path: Path) -> None:
    printed = told(tmp_path, "tests/test_it.py", "-vv")
    assert "test_sleeps_longer PASSED" in printed
    assert not re.search(r"^\[gw\d+\]|created: ", printed, re.MULTILINE)  # as xdist tells of its processes
    assert "budget" not in printed
