"""Which package may import which: the contracts in pyproject.toml, over the sources laid as installing lays them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"


def laid_together(folder: Path) -> Path:
    """Links to all sources under their import names, in `folder`; returns it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    for package, place in settings["tool"]["setuptools"]["package-dir"].items():
        for file in (ROOT / place).rglob("*.py"):
            link = folder / package.replace(".", "/") / file.relative_to(ROOT / place)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    return folder


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """What import-linter says of the package in `folder`."""
    command = [sys.executable, "-P", "-c", LINT, str(ROOT / "pyproject.toml")]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


def test_the_contracts_hold(tmp_path: Path) -> None:
    said = lint(laid_together(tmp_path))
    assert said.returncode == 0, said.stdout + said.stderr
    assert " 0 broken" in said.stdout


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("formats/peeks.py", "from gemexport.exporters import result", "gemexport.formats is not allowed to import"),
        ("exporters/peeks.py", "def late():\n    import gemexport.validators", "gemexport.exporters is not allowed to"),
        ("report/peeks.py", "import gemexport.judge.verdict", "gemexport.report is not allowed to import"),
        ("engine/peeks.py", "import gemexport.report.schema", "gemexport.engine is not allowed to import"),
        ("unplaced.py", "", "gemexport.unplaced"),
    ],
)
def test_what_breaks_them_is_found(file: str, source: str, message: str, tmp_path: Path) -> None:
    (laid_together(tmp_path) / "gemexport" / file).write_text(source)
    said = lint(tmp_path)
    assert said.returncode == 1
    assert message in said.stdout
