"""Every command in an environment with none of the extras: its exit status and its line, as a table.

The environment is a fresh one that has gemexport and the packages that it requires, linked from the one that runs this;
nothing is downloaded.

    python benchmarks/bare.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

from gemexport import demo
from gemexport.registry import TARGETS

Found = tuple[str, int, str]  # the command, its exit status, and what it says


def environment(folder: Path) -> Path:
    """The interpreter of a new environment in `folder`."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    for name in sorted(required("gemexport")):
        for path in lying(distribution(name)):
            if not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    return python


def required(name: str, extra: str = "", seen: frozenset[tuple[str, str]] = frozenset()) -> set[str]:
    """The distributions that one needs without its extras, itself with them."""
    if (name, extra) in seen:
        return set()
    found, seen = {name}, seen | {(name, extra)}
    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            for wanted in requirement.extras or {""}:
                found |= required(requirement.name, wanted, seen)
    return found


def lying(found: Distribution) -> set[Path]:
    """The files and folders of a distribution in the folder for packages."""
    tops = {file.parts[0] for file in found.files or () if file.parts[0] != ".."}
    return {Path(str(found.locate_file(top))) for top in tops if not top.startswith("__pycache__")}


def commands(folder: Path) -> list[list[str]]:
    """Every command, on a tiny model made in `folder`, on a GGUF file, and on what nobody has."""
    model = demo.make(folder / "model", family="gemma3", size="tiny")
    gguf = folder / "somebodys.gguf"
    gguf.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    return [
        *([name, str(model), "-o", str(folder / "out")] for name in ("all", *TARGETS)),
        ["demo", str(folder / "demo")],
        ["plan", str(model)],
        ["validate", str(model), str(model)],
        ["inspect", str(model)],
        ["inspect", str(model / "model.safetensors")],
        ["inspect", str(gguf)],
        ["all", str(gguf), "-o", str(folder / "out")],
        ["all", "google/gemma-3-270m-it", "-o", str(folder / "out")],
        ["--version"],
        ["--help"],
    ]


def run(python: Path, folder: Path) -> Iterator[Found]:
    """What becomes of every command, one after the other."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for command in commands(folder):
        line = [str(python), "-P", "-m", "gemexport.cli", *command]
        done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder, env=clean)
        said = done.stderr.strip() or next(iter(done.stdout.strip().splitlines()), "")
        yield " ".join(command), done.returncode, said


def main() -> int:
    """Run as a script."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        print("| command | status | it says |\n| --- | ---: | --- |")
        for command, status, said in run(environment(folder / "bare"), folder):
            shown = [
                text.replace(f"{folder}/", "").replace("|", "\\|").replace("\n", "<br>") for text in (command, said)
            ]
            print(f"| `{shown[0]}` | {status} | {shown[1]} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
