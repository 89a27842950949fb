"""Runs what a newcomer would type, and writes docs/transcript.md of what was printed: nothing in it is by hand.

    python benchmarks/transcript.py --model DIR --adapter DIR --gguf FILE [--environment DIR] [--out docs/transcript.md]

README's two commands run in a fresh clone of this repository; with `--environment` that one is used in place of a new
one, and the page says so. `--model` is the base that the adapter was made for, `--gguf` a file that somebody else made.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 60  # lines of an answer that are shown: the first and the last


@dataclass(frozen=True)
class Step:
    """What is typed, and what it is for."""

    title: str
    commands: tuple[str, ...]


def steps(made: bool) -> list[Step]:
    """The page; `made`: with an environment of its own."""
    if made:
        first = (
            "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt '.[all]' && .venv/bin/gemexport demo"
        )
        second = ".venv/bin/pip install -q -c constraints.txt '.[all,dev]' && .venv/bin/pytest"
        begin = Step("README's two commands", (first, second))
    else:
        begin = Step("README's first command, in an environment that was there", ("gemexport demo",))
    return [
        begin,
        Step(
            "A fine-tune: the model, and a LoRA beside it",
            (
                "gemexport inspect model", "gemexport plan model --adapter adapter",
                "gemexport all model --adapter adapter -o tuned", "gemexport inspect tuned",
                "cd tuned && sha256sum -c SHA256SUMS",
            ),
        ),
        Step(
            "A GGUF file that somebody else made",
            (
                "gemexport inspect somebodys.gguf", "gemexport validate model somebodys.gguf",
                "gemexport mlx somebodys.gguf -o from-gguf", "gemexport onnx somebodys.gguf -o from-gguf",
            ),
        ),
        Step(
            "What goes wrong",
            ("gemexport all google/gemma-3-270m-it", "gemexport gguf model --variant Q4", "gemexport al model"),
        ),
    ]  # fmt: skip


def ran(command: str, folder: Path, path: str) -> str:
    """One command as a terminal would show it: what was typed, what was printed, how it ended and how long it took."""
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**os.environ, "PATH": path, "COLUMNS": "118"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    lines = done.stdout.replace(str(folder), "~").splitlines()
    if len(lines) > LONGEST:
        half = LONGEST // 2
        lines = [*lines[:half], f"[… {len(lines) - 2 * half} lines …]", *lines[-half:]]
    ended = f"[exit status {done.returncode}, {time.monotonic() - started:.0f} s]"
    return "\n".join(f"    {line}".rstrip() for line in (f"$ {command}", *lines, ended))


def page(folder: Path, made: bool, path: str) -> str:
    """All of it, in Markdown."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    intro = (
        "# A newcomer's transcript\n\nWritten by `benchmarks/transcript.py` out of what the commands printed, at "
        f"{commit}, on {platform.system()} {platform.machine()} with {os.cpu_count()} cores and Python "
        f"{platform.python_version()}. Of long answers the middle is left out.\n"
    )
    parts = [intro]
    for step in steps(made):
        parts.append(f"\n## {step.title}\n")
        parts += [f"\n{ran(command, folder, path)}\n" for command in step.commands]
    return "".join(parts)


def main() -> int:
    """Parse the command line, run, write."""
    parser = argparse.ArgumentParser(description="Write a newcomer's transcript.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--environment", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "transcript.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gemexport-transcript-") as temporary:
        folder = Path(temporary) / "gemexport"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        for name, given in (("model", options.model), ("adapter", options.adapter), ("somebodys.gguf", options.gguf)):
            (folder / name).symlink_to(given.resolve())
        environment = options.environment or folder / ".venv"
        path = f"{environment.absolute() / 'bin'}{os.pathsep}{os.environ['PATH']}"
        text = page(folder, options.environment is None, path)
    options.out.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
