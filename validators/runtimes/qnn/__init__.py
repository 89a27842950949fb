"""Qualcomm's own compiler and emulator as a validator of the NPU variants: onnxruntime-qnn carries both for Linux.

A folder's decoder either compiles whole for the HTP, with nothing left to the CPU, and leaves context binaries, or
every node that was refused is named. What the emulator computes, and what ONNX Runtime's CPU provider computes, is
judged against exact arithmetic: neither is the truth.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import atomic
from gemexport.formats.storage.installing import install
from gemexport.formats.tensor import Floats
from gemexport.validators.checks.divergence import Divergence
from gemexport.validators.runtimes.onnx_exact import ExactGraph
from gemexport.validators.runtimes.onnxruntime import NpuModel, Session, cpu_session
from gemexport.validators.runtimes.qnn.log import Refusal, refusals
from gemexport.validators.runtimes.qnn.process import htp_session

PACKAGE = "onnxruntime_qnn"
# The first generation that multiplies 16-bit activations by 16-bit keys and values (Snapdragon 8 Gen 2, X Elite).
ARCHITECTURE = "73"
DECODER = ("prefill", "decode")
Answer = dict[str, Any]
SINGLE = 2  # tokens that go one at a time: emulated, one takes as long as a chunk


@dataclass(frozen=True)
class HtpReport:
    """What became of a folder's decoder in the HTP's compiler."""

    architecture: str
    seconds: float
    refused: tuple[Refusal, ...]
    errors: tuple[str, ...]  # what went wrong, a line a graph
    context: Path | None  # folder of the context binary and the graphs that name it; None when a node was refused
    context_bytes: int = 0  # of the binary

    @property
    def compiled(self) -> bool:
        """Whether every node of every graph is the HTP's."""
        return self.context is not None


class _NotCompiled(Exception):
    """Leaves the writing of a context that will not be."""


def unavailable() -> str | None:
    """Why there is no compiler on this machine; None when there is one."""
    if find_spec(PACKAGE) is None:
        return f"onnxruntime-qnn is not installed; {install('npu')}"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "onnxruntime-qnn has the HTP's compiler and emulator for Linux on x86-64 alone"
    return None


def compile(path: Path, context: Path, *, architecture: str = ARCHITECTURE, share: bool = False) -> HtpReport:
    """Compile the decoder in the folder `path`; context binaries and the two small graphs that name them appear in
    `context`.

    `architecture` is the HTP's version (68, 69, 73, 75, 79, 81). With `share` both graphs are in one binary and have
    one copy of the weights; the emulator of QNN 2.51 crashes when it loads such a one, so it cannot be checked here.
    Raises InputError where there is no compiler, or no decoder in the folder.
    """
    problem = unavailable()
    if problem is not None:
        raise InputError(path, "cannot be compiled for the NPU", problem)
    files = [Path(path) / f"{name}.onnx" for name in DECODER]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(path, f"there is no {missing[0]}", "give the folder of an NPU variant")
    try:
        with atomic(Path(context)) as partial:
            partial.mkdir()
            answers, log = _compile(files, partial, architecture, share)
            if any(answer["error"] for answer in answers) or len(answers) < len(files):
                raise _NotCompiled
    except _NotCompiled:
        errors = tuple(f"{answer['graph']}: {answer['error']}" for answer in answers if answer["error"])
        died = () if len(answers) == len(files) else (f"the compiler died: {_last_line(log)}",)
        return HtpReport(architecture, _seconds(answers), tuple(refusals(log)), errors + died, None)
    size = sum(file.stat().st_size for file in Path(context).glob("*.bin"))
    return HtpReport(architecture, _seconds(answers), (), (), Path(context), size)


def _compile(files: Sequence[Path], out: Path, architecture: str, share: bool) -> tuple[list[Answer], str]:
    """What the compiling process answered, and its log."""
    settings = [str(out), "share" if share else "apart", json.dumps({"htp_arch": architecture})]
    command = [sys.executable, "-P", "-m", "gemexport.validators.runtimes.qnn.process", *settings, *map(str, files)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8", check=False)
        log.seek(0)
        return [json.loads(line) for line in run.stdout.splitlines()], log.read()


def _seconds(answers: Iterable[Answer]) -> float:
    return float(sum(answer["seconds"] for answer in answers))


def _last_line(log: str) -> str:
    return next((line for line in reversed(log.splitlines()) if line.strip()), "it said nothing")


def chunk(path: Path) -> int:
    """How many tokens the prompt graph in the folder `path` takes at once."""
    inputs = {value.name: value for value in ExactGraph(Path(path) / "prefill.onnx").get_inputs()}
    length = inputs["position_ids"].shape[1]
    assert isinstance(length, int)
    return length


def load(path: Path, context: Path, *, threads: int, length: int) -> NpuModel:
    """The compiled decoder in the emulator, fed by the lookup in the folder `path`; `length` as `NpuModel` has it."""
    name = f"HTP emulator (onnxruntime-qnn {version('onnxruntime-qnn')})"
    return _model(name, path, context, threads, length, lambda file: htp_session(file, {}))


def on_cpu(path: Path, *, threads: int, length: int) -> NpuModel:
    """The decoder in the folder `path` on ONNX Runtime's CPU provider."""
    name = f"ONNX Runtime {version('onnxruntime')}"
    return _model(name, path, path, threads, length, lambda file: cpu_session(file, threads))


def exact(path: Path, *, length: int) -> NpuModel:
    """The decoder in the folder `path` in exact arithmetic."""
    return _model("float64", path, path, 1, length, ExactGraph)


def _model(
    name: str, path: Path, decoder: Path, threads: int, length: int, opened: Callable[[Path], Session]
) -> NpuModel:
    """The graphs in the folder `decoder` as `opened` runs them, after the lookup in the folder `path` on the CPU."""
    files = {graph: Path(decoder) / f"{graph}.onnx" for graph in DECODER}
    files["embeddings"] = Path(path) / "embeddings.onnx"

    def open_graph(graph: str, file: Path) -> Session:
        return cpu_session(file, threads) if graph == "embeddings" else opened(file)

    model = NpuModel(Path(path), files, length, open_graph)
    model.name, model.single = name, SINGLE
    return model


@dataclass(frozen=True)
class Comparison:
    """One way to compute a graph against another, on the same tokens."""

    of: str
    against: str
    divergence: Divergence
    max_difference: float  # of a logit


def compare(path: Path, context: Path, tokens: Sequence[int], *, threads: int) -> list[Comparison]:
    """The emulator and the CPU provider against exact arithmetic, and the emulator against the CPU provider."""
    length = len(tokens)
    makers = {
        "exact": lambda: exact(path, length=length),
        "cpu": lambda: on_cpu(path, threads=threads, length=length),
        "htp": lambda: load(path, context, threads=threads, length=length),
    }
    found: dict[str, Floats] = {}
    for name, make in makers.items():
        model = make()
        found[name] = np.asarray(model.logits(tokens), np.float32)
        model.close()
    pairs = (("htp", "exact"), ("cpu", "exact"), ("htp", "cpu"))
    return [_compared(of, against, found, tokens) for of, against in pairs]


def _compared(of: str, against: str, found: dict[str, Floats], tokens: Sequence[int]) -> Comparison:
    total = Divergence()
    total.add(found[against], found[of], list(tokens))
    return Comparison(of, against, total, float(np.abs(found[of] - found[against]).max()))
