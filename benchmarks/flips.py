"""Changes single bytes at random places of every default artefact, and has the validator judge each.

    python benchmarks/flips.py [--flips 1000] [--only gguf] [--seed 0] [--json FILE]

Every part of an artefact (weights, what stands before them, graphs, tokenizer, settings) gets as many as any other. A
flip is caught when the verdict is not `pass`. What passes is run: the program's logits, ids, texts and layouts must all
be what they were, or the flip was missed. The steps are a run's own, in a process that is started anew when it dies, as
a step's does. Exit status 1: a flip was missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gemexport import demo
from gemexport.faults.matrix import COLUMNS, Bench
from gemexport.formats.gguf.parts import read_parts
from gemexport.judge.wording import Artifact
from gemexport.registry import TARGETS
from gemexport.validators.checks import chat, prompts
from gemexport.validators.runtimes.protocol import TopLogits

CONTEXT = 30  # bytes around a flip that are shown
# What no program of a format reads: how to run an artefact, for people.
UNREAD = ("generate.py",)
KINDS = {".onnx": "graph", ".mlmodel": "graph", ".data": "weights", ".bin": "weights"}  # of files by their endings


@dataclass(frozen=True)
class Flip:
    """A byte of an artefact that is another, and what became of it."""

    target: str
    variant: str
    part: str
    file: str
    offset: int
    bits: int  # that were turned
    around: str  # the bytes about it, as they were
    verdict: str = ""  # caught, same, missed
    reason: str = ""


def parts(path: Path) -> dict[str, list[tuple[Path, int, int]]]:
    """The parts of an artefact: for each, stretches of files."""
    folder = path.parent if path.suffix == ".mlpackage" or path.is_file() else path
    files = [path] if path.is_file() else [file for file in sorted(folder.rglob("*")) if file.is_file()]
    found: dict[str, list[tuple[Path, int, int]]] = {}
    for file in files:
        size = file.stat().st_size
        if file.name in UNREAD:
            continue
        if file.suffix in (".gguf", ".safetensors"):
            split = _head(file)
            found.setdefault("head", []).append((file, 0, split))
            found.setdefault("weights", []).append((file, split, size))
            continue
        kind = "tokenizer" if file.name == "tokenizer.json" else KINDS.get(file.suffix, "settings")
        found.setdefault(kind, []).append((file, 0, size))
    return found


def _head(file: Path) -> int:
    """Where the weights of a file begin."""
    if file.suffix == ".safetensors":
        return 8 + int.from_bytes(file.read_bytes()[:8], "little")
    container = read_parts(file).containers[0]
    return min(item.offset for item in container.tensors.values())


def draw(stream: random.Random, target: str, variant: str, path: Path) -> Flip:
    """A flip: each part alike, each byte of a part alike."""
    part, stretches = stream.choice(sorted(parts(path).items()))
    file, start, stop = stream.choices(stretches, [stop - start for _, start, stop in stretches])[0]
    offset = stream.randrange(start, stop)
    data = file.read_bytes()[max(0, offset - CONTEXT) : offset + CONTEXT]
    root = path.parent
    return Flip(target, variant, part, str(file.relative_to(root)), offset, stream.randrange(1, 256), repr(data)[2:-1])


class Judge:
    """Judges flips of a tiny model's artefacts, in this process."""

    def __init__(self, work: Path) -> None:
        self.bench = Bench(work / "model", work / "work")

    def judge(self, flip: Flip) -> tuple[str, str]:
        """What became of a flip, and why."""
        clean = self.bench.clean(flip.target, flip.variant)
        path = self.bench.work / "flipped" / flip.target / clean.name
        shutil.rmtree(path.parent, ignore_errors=True)
        root = clean.parent
        if clean.suffix == ".mlpackage" or clean.is_file():
            shutil.copytree(root, path.parent)
        else:
            path.parent.mkdir(parents=True)
            shutil.copytree(clean, path)
        with (path.parent / flip.file).open("r+b") as file:
            file.seek(flip.offset)
            byte = file.read(1)[0]
            file.seek(flip.offset)
            file.write(bytes([byte ^ flip.bits]))
        try:
            status, reason = self.bench.judge(flip.target, flip.variant, path, wording=flip.part != "weights")
        except Exception as error:  # which a step ends with
            return "caught", f"a step that fails: {type(error).__name__}: {error}"
        if status != "pass":
            return "caught", reason
        same = outputs(self.bench, flip.target, path) == self._clean(flip.target, flip.variant)
        return ("same", "") if same else ("missed", "its program gives another output, and the verdict is pass")

    @lru_cache(maxsize=1)  # noqa: B019 - there is one judge
    def _clean(self, target: str, variant: str) -> Any:
        return outputs(self.bench, target, self.bench.clean(target, variant))


def outputs(bench: Bench, target: str, path: Path) -> Any:
    """Everything that the format's program gives: logits, ids, texts, layouts, ends; of a tokenizer beside it too."""
    sequences = bench.place.sequences(bench.checkpoint)
    runtime = TARGETS[target].adapter().load(path, threads=1, context=max(map(len, sequences)) + 1)
    found: list[Any] = []
    for sequence in sequences[:1]:
        logits = runtime.logits(sequence)
        numbers = (logits.ids, logits.logprobs) if isinstance(logits, TopLogits) else (logits,)
        found += [np.ascontiguousarray(part).tobytes() for part in numbers]
    artifact = Artifact.of(path, bench.work)
    encode = artifact.encode() if artifact else None
    for text in prompts.prompts():
        found += [runtime.tokenize(text), encode(text) if encode else None]
    for habits in (runtime.habits(), artifact.habits() if artifact else None):
        if habits is not None:
            ids = sequences[0]
            found.append((habits.begins, habits.stops, habits.decode(ids) if habits.decode else None))
    layouts = [conversation.layout() for conversation in chat.CONVERSATIONS]
    template = artifact.template() if artifact else None
    found += [runtime.chat(layouts), template.render(layouts) if template else None]
    runtime.close()
    return found


_judge: Judge | None = None


def _start(work: Path) -> None:
    global _judge  # noqa: PLW0603 - a process has one judge
    _judge = Judge(work)


def _judged(flip: Flip) -> tuple[str, str]:
    assert _judge is not None
    return _judge.judge(flip)


def run(work: Path, flips: list[Flip]) -> list[Flip]:
    """The flips with what became of them; whoever dies on one has caught it, as a step that dies is an error."""
    done: list[Flip] = []
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, _start, (work,))
    for flip in flips:
        try:
            verdict, reason = pool.submit(_judged, flip).result()
        except BrokenProcessPool:
            verdict, reason = "caught", "the process died"
            pool = ProcessPoolExecutor(1, context, _start, (work,))
        done.append(Flip(**{**asdict(flip), "verdict": verdict, "reason": reason.splitlines()[0] if reason else ""}))
        if verdict != "caught" or reason.startswith(("the process", "a step")):
            print(f"{verdict}: {flip.file} {flip.offset} ^{flip.bits:#x}: {flip.around} {reason[:200]}", flush=True)
        if len(done) % 50 == 0:
            print(f"{flip.target} {flip.variant}: {Counter(item.verdict for item in done)}", flush=True)
    pool.shutdown()
    return done


def main() -> int:
    """1 when a flip was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--only", help="formats, as a pattern")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="leave every flip there")
    asked = parser.parse_args()
    found: list[Flip] = []
    with tempfile.TemporaryDirectory(prefix="gemexport-flips-") as folder:
        work = Path(folder)
        demo.make(work / "model", size="tiny")
        bench = Bench(work / "model", work / "work")
        for target, variant in COLUMNS:
            if asked.only and not re.search(asked.only, f"{target}:{variant}"):
                continue
            stream = random.Random(f"{asked.seed} {target} {variant}")
            path = bench.clean(target, variant)
            found += run(work, [draw(stream, target, variant, path) for _ in range(asked.flips)])
            if asked.json is not None:
                asked.json.write_text(json.dumps([asdict(flip) for flip in found], indent=1), "utf-8")
    print("| artefact | part | flips | caught | no output changes | missed |\n| --- | --- | --- | --- | --- | --- |")
    for name, part in dict.fromkeys((f"{flip.target} {flip.variant}", flip.part) for flip in found):
        these = [flip for flip in found if (f"{flip.target} {flip.variant}", flip.part) == (name, part)]
        count = Counter(flip.verdict for flip in these)
        print(f"| {name} | {part} | {len(these)} | {count['caught']} | {count['same']} | {count['missed']} |")
    return int(any(flip.verdict == "missed" for flip in found))


if __name__ == "__main__":
    sys.exit(main())
