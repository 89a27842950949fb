"""Exchanges the checkpoint at random moments of `gemexport all`: every run must end with status 2 and leave nothing.

    python benchmarks/swaps.py --swaps 10 [--seed 0] [--tokens 64] [--only gguf,mlx]

Another model of the same shapes takes the place of a small one, in turn by renaming its folder, by renaming a file into
it, and by writing over the weights as they lie there. Exit status 1: a run ended otherwise.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gemexport import demo

MARK = ".gemexport/model.json"  # is there from when the checkpoint is open
WEIGHTS = "model.safetensors"


def by_folder(model: Path, other: Path) -> None:
    """Rename the other model's folder."""
    model.rename(model.with_name("old"))
    shutil.copytree(other, model.with_name("new"))
    model.with_name("new").rename(model)


def by_file(model: Path, other: Path) -> None:
    """Rename a file of weights into the folder, of the same time as the one there."""
    shutil.copyfile(other / WEIGHTS, model / "beside")
    shutil.copystat(model / WEIGHTS, model / "beside")
    (model / "beside").replace(model / WEIGHTS)


def in_place(model: Path, other: Path) -> None:
    """Write over the weights."""
    with (model / WEIGHTS).open("r+b") as file:
        file.write((other / WEIGHTS).read_bytes())


WAYS: tuple[Callable[[Path, Path], None], ...] = (by_folder, by_file, in_place)


def start(model: Path, out: Path, further: list[str]) -> subprocess.Popen[str]:
    """A run that has opened its checkpoint."""
    command = [sys.executable, "-m", "gemexport.cli", "all", str(model), "-o", str(out), *further]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out / MARK).exists() and run.poll() is None:
        time.sleep(0.005)
    return run


def swap(
    work: Path, sources: tuple[Path, Path], way: Callable[[Path, Path], None], wait: float, further: list[str]
) -> str:
    """What is wrong with a run whose checkpoint is exchanged after `wait` seconds; empty where nothing is."""
    model, out = work / "model", work / "out"
    for path in (model, out, model.with_name("old")):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sources[0], model)
    run = start(model, out, further)
    time.sleep(wait)
    if run.poll() is not None:
        return "the run had ended"
    way(model, sources[1])
    lines = run.communicate()[1].strip().splitlines()
    said = [line for line in lines if not line.endswith(")") or ": done (" not in line]  # but for steps that ended
    left = [str(path.relative_to(out)) for path in out.rglob("*")] if out.exists() else []
    print(f"{wait:5.1f} s, {way.__name__}: status {run.returncode}, {said[-1] if said else ''}", flush=True)
    if run.returncode != 2 or left or len(said) != 1 or "while" not in said[0]:
        return f"status {run.returncode}, {said}, left {left}"
    return ""


def main() -> int:
    """1 when a run did not notice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only", help="some formats")
    asked = parser.parse_args()
    further = ["--tokens", str(asked.tokens), *(["--only", asked.only] if asked.only else [])]
    draw, wrong, done = random.Random(asked.seed), 0, 0
    with tempfile.TemporaryDirectory(prefix="gemexport-swaps-") as folder:
        work = Path(folder)
        sources = demo.make(work / "first", size="tiny", seed=1), demo.make(work / "second", size="tiny", seed=2)
        begun = time.monotonic()
        if start(sources[0], work / "clean", further).wait():
            raise RuntimeError("the model does not pass by itself")
        seconds = time.monotonic() - begun
        while done < asked.swaps:
            found = swap(work, sources, WAYS[done % len(WAYS)], draw.uniform(0, seconds), further)
            if found == "the run had ended":
                continue
            done += 1
            if found:
                wrong += 1
                print(found, file=sys.stderr)
    print(f"{done} swaps in runs of {seconds:.0f} s, {wrong} not noticed")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
