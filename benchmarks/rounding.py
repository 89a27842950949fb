"""What 4 bits cost a plain checkpoint: gemexport's recipes and its peers at their best settings, by one judge.

Every side writes its artefact, which is measured (seconds, memory, bytes of weights); then the numbers in it are read
back, PyTorch computes in float32 with them on texts that no calibration saw, and the logits are compared with those of
the checkpoint's own. What a runtime adds of its own is thereby left out, and all are judged alike. Peers that calibrate
are given gemexport's calibration texts. A side that fails is a row that says why.

    python benchmarks/rounding.py MODEL --work FOLDER [--sides "gemexport rtn, MLX; mlx-lm group 32"]
                                  [--tokens 2048] [--artifact NAME=PATH …] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from environments import PEERS
from machine import machine
from peers import fitting
from processes import Usage, measure
from rich.console import Console
from rich.table import Table

from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.tensor import Tensor
from gemexport.registry import recognise
from gemexport.shared.place import Place, threads
from gemexport.validators.checks import prompts
from gemexport.validators.checks.divergence import Divergence
from gemexport.validators.reference import reference

PEER = {peer.name: peer for peer in PEERS}
WEIGHTS = (".safetensors", ".gguf")
# Where mlx-lm looks for the text that it calibrates on, before it would fetch another.
MLX_CALIBRATION = ".cache/mlx-lm/calibration_v5.txt"


@dataclass(frozen=True)
class Side:
    """A program and how it is asked; `commands` of (work folder, checkpoint, output folder)."""

    name: str
    commands: Callable[[Path, Path, Path], list[list[str]]]
    peer: str | None = None  # whose environment it runs in


@dataclass
class Row:
    """What was measured of one side."""

    name: str
    artifact: Path | None = None
    bytes: int | None = None  # of weights
    seconds: float | None = None
    resident_bytes: int | None = None
    kld: float | None = None
    kld_error: float | None = None
    top1: float | None = None
    problem: str = ""


def ours(target: str, recipe: str = "default", *options: str) -> Callable[[Path, Path, Path], list[list[str]]]:
    """Our export into a format, as a user would ask for it, without the validator."""

    def commands(work: Path, model: Path, out: Path) -> list[list[str]]:
        command = [sys.executable, "-m", "gemexport.cli", target, str(model), "-o", str(out), "--recipe", recipe]
        return [[*command, *options, "--no-validate", "--fresh"]]

    return commands


def mlx_lm(verb: str, *options: str) -> Callable[[Path, Path, Path], list[list[str]]]:
    """One of mlx-lm's quantizers, at home in a folder where its calibration text is ours."""

    def commands(work: Path, model: Path, out: Path) -> list[list[str]]:
        home = work / "mlx-home"
        (home / MLX_CALIBRATION).parent.mkdir(parents=True, exist_ok=True)
        (home / MLX_CALIBRATION).write_text("\n\n".join(prompts.texts(prompts.CALIBRATION)), "utf-8")
        source = "--hf-path" if verb == "convert" else "--model"
        program = ["env", f"HOME={home}", str(PEER["mlx-lm"].python(work)), "-m", "mlx_lm", verb]
        return [[*program, source, str(model), "--mlx-path", str(out / "mlx"), *options]]

    return commands


def llama_cpp(kind: str, *options: str) -> Callable[[Path, Path, Path], list[list[str]]]:
    """llama.cpp's converter, then its quantizer with a type of its own."""

    def commands(work: Path, model: Path, out: Path) -> list[list[str]]:
        home = work / "llama.cpp"
        convert, _ = PEER["llama.cpp"].commands(home, model, out)
        whole = convert[convert.index("--outfile") + 1]
        quantize = [str(home / "build/bin/llama-quantize"), *options, whole, str(out / f"model-{kind}.gguf"), kind]
        return [convert, quantize, ["rm", whole]]

    return commands


GROUP_32 = ("-q", "--q-bits", "4", "--q-group-size", "32")
SIDES = [
    Side("gemexport default, MLX", ours("mlx")),
    Side("gemexport default, GGUF", ours("gguf")),
    Side("gemexport int4, MLX", ours("mlx", "int4")),
    Side("gemexport int4, GGUF", ours("gguf", "int4")),
    Side("gemexport rtn, MLX", ours("mlx", "rtn")),
    # The types that ggml's own library fits, without building llama.cpp: K-quants follow no recipe.
    Side("ggml Q4_K_M, by gemexport", ours("gguf", "rtn", "--variant", "Q4_K_M")),
    Side("mlx-lm group 32", mlx_lm("convert", *GROUP_32), "mlx-lm"),
    Side("mlx-lm group 64", mlx_lm("convert", *GROUP_32[:-1], "64"), "mlx-lm"),
    Side("mlx-lm dynamic_quant", mlx_lm("dynamic_quant"), "mlx-lm"),
    Side("mlx-lm gptq", mlx_lm("gptq", "--bits", "4", "--group-size", "32"), "mlx-lm"),
    Side("mlx-lm awq", mlx_lm("awq", "--bits", "4", "--group-size", "32"), "mlx-lm"),
    Side("llama.cpp Q4_0", llama_cpp("Q4_0"), "llama.cpp"),
    Side("llama.cpp Q4_0 --pure", llama_cpp("Q4_0", "--pure"), "llama.cpp"),
    Side("llama.cpp Q4_K_M", llama_cpp("Q4_K_M"), "llama.cpp"),
]


class Judge:
    """The checkpoint's logits on texts that no calibration saw, and what an artefact's are off by."""

    def __init__(self, model: Path, work: Path, tokens: int) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(model)
        self.work = work
        self.sequences = [found.tokens for found in Place(model, work / "judge", tokens).passages(self.checkpoint)]
        self.wanted = self._logits(dict(self.checkpoint.tensors), work / "judge" / "source")

    def _logits(self, tensors: dict[str, Tensor], folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{number}.npy" for number in range(len(self.sequences))]
        if not all(path.is_file() for path in paths):
            reference(self.checkpoint.text_config, tensors, threads()).write_logits(self.sequences, paths)
        return paths

    def __call__(self, artifact: Path) -> Divergence:
        """The divergence of the model that has the artefact's numbers."""
        stored = dict(recognise(artifact).reader().tensors(artifact))
        found = Divergence()
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            for wanted, path, tokens in zip(
                self.wanted, self._logits(stored, Path(folder)), self.sequences, strict=True
            ):
                found.add(np.load(wanted, mmap_mode="r"), np.load(path, mmap_mode="r"), tokens)
        return found


def written(out: Path) -> Path:
    """The artefact in a side's output folder."""
    files = sorted(path for path in out.rglob("*") if path.suffix in WEIGHTS and ".gemexport" not in path.parts)
    if not files:
        raise RuntimeError(f"{out} has no weights")
    return files[0] if files[0].suffix == ".gguf" else files[0].parent


def weights_bytes(artifact: Path) -> int:
    """Bytes of the files that hold weights."""
    files = [artifact] if artifact.is_file() else [path for path in artifact.iterdir() if path.suffix in WEIGHTS]
    return sum(path.stat().st_size for path in files)


def made(side: Side, model: Path, work: Path) -> tuple[Path, Usage]:
    """A side's artefact, and what making it took."""
    if side.peer is not None:
        PEER[side.peer].install(work)
    out = work / "out" / side.name.replace(" ", "-").replace(",", "")
    shutil.rmtree(out, ignore_errors=True)
    if side.peer is not None:
        out.mkdir(parents=True)
    usages = [measure(command) for command in side.commands(work, model, out)]
    return written(out), sum(usages[1:], start=usages[0])


def judged(row: Row, judge: Judge) -> Row:
    """The row of an artefact with its size and its loss."""
    assert row.artifact is not None
    found = judge(row.artifact)
    row.bytes, row.kld, row.kld_error = weights_bytes(row.artifact), found.kld_mean, found.kld_error
    row.top1 = found.top1_agreement
    return row


def rows(sides: Sequence[Side], given: Sequence[tuple[str, Path]], model: Path, work: Path, tokens: int) -> list[Row]:
    """A row for each side, and for each artefact that was given."""
    judge, source, found = Judge(model, work, tokens), fitting(model, work), []
    for name, path in given:
        found.append(judged(Row(name, path), judge))
        print(found[-1], file=sys.stderr, flush=True)
    for side in sides:
        row = Row(side.name)
        try:
            row.artifact, usage = made(side, source, work)
            row.seconds, row.resident_bytes = usage.seconds, usage.resident_bytes
            judged(row, judge)
        except RuntimeError as error:  # a program that fails is what this table tells
            row.problem = str(error).strip().splitlines()[-1]
        found.append(row)
        print(row, file=sys.stderr, flush=True)
    return found


def table(found: Sequence[Row], title: str) -> Table:
    """What was measured, the smallest loss first."""
    made = Table(title=title, title_justify="left")
    for column in ("", "weights, MB", "loss, nats", "same top-1", "seconds", "peak RSS, GB"):
        made.add_column(column, justify="right" if column else "left")
    for row in sorted(found, key=lambda row: (row.kld is None, row.kld or 0)):
        if row.kld is None or row.bytes is None or row.top1 is None:
            made.add_row(row.name, row.problem)
            continue
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        memory = "" if row.resident_bytes is None else f"{row.resident_bytes / 1e9:.2f}"
        loss = f"{row.kld:.4f} ± {row.kld_error:.4f}"
        made.add_row(row.name, f"{row.bytes / 1e6:.0f}", loss, f"{row.top1:.1%}", seconds, memory)
    return made


def main() -> int:
    """Parse the command line, run, print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="What 4 bits cost a plain checkpoint, by program.")
    parser.add_argument("model", type=Path, help="a plain checkpoint in Hugging Face layout")
    parser.add_argument("--work", type=Path, required=True, help="folder for environments and outputs")
    parser.add_argument("--sides", default="; ".join(side.name for side in SIDES), help="some of these, by semicolons")
    parser.add_argument("--artifact", action="append", default=[], help="NAME=PATH: one that lies there already")
    parser.add_argument("--tokens", type=int, default=2048, help="of texts that the loss is measured on")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    options = parser.parse_args()
    asked = [name.strip() for name in options.sides.split(";") if name.strip()]
    unknown = set(asked) - {side.name for side in SIDES}
    if unknown:
        parser.error(f"--sides: {', '.join(sorted(unknown))} are none of {'; '.join(side.name for side in SIDES)}")
    given = [(name, Path(path)) for name, _, path in (item.partition("=") for item in options.artifact)]
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    sides = [side for side in SIDES if side.name in asked]
    found = rows(sides, given, options.model.resolve(), work, options.tokens)
    Console().print(table(found, f"{options.model.name}, {options.tokens} tokens"))
    if options.json:
        result = {"machine": machine(), "tokens": options.tokens, "rows": [asdict(row) for row in found]}
        options.json.write_text(json.dumps(result, indent=1, default=str) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
