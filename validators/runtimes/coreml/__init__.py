"""Core ML artefacts, run: by an evaluator of ML programs in PyTorch on any machine, by Core ML itself on a Mac.

`Program` runs any .mlpackage; `load` gives language models the interface that the logits validator asks for. As a
command, `python -P -m gemexport.validators.runtimes.coreml PACKAGE PROMPT` continues a text.
"""

from __future__ import annotations

import argparse
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gemexport.formats.coreml import canonical_name
from gemexport.formats.coreml.activations import activations
from gemexport.formats.coreml.package import Package, coremltools, open_package
from gemexport.formats.storage.errors import InputError
from gemexport.validators.checks.habits import Habits
from gemexport.validators.checks.layers import in_order
from gemexport.validators.mil.evaluator import Arithmetic, Observer, Program
from gemexport.validators.runtimes import protocol as runtime
from gemexport.validators.runtimes.coreml.feeds import LOGITS, Feeds, feeds

__all__ = ["CoreMLModel", "Device", "Program", "Range", "load", "ranges"]

CHUNK = 256  # tokens of a prompt at once
SINGLE = 8  # tokens at the end of a sequence that go one at a time, through the states
HOLD = 4 << 30  # bytes of dequantized weights that stay in memory


def load(
    path: Path,
    *,
    threads: int,
    context: int,
    frugal: bool = False,
    arithmetic: Literal["f32", "f16", "device"] = "f32",
) -> CoreMLModel:
    """The language model in the package `path`: evaluated in `f32` or `f16`, or by the `device` itself (macOS only).

    The evaluator holds up to 4 GiB of weights as f32, or, `frugal`, reads them again at every step.

    Raises InputError for a package that is broken, is no language model, or holds fewer than `context` tokens.
    """
    how = feeds(open_package(path))
    if context > how.context:
        raise InputError(path, f"its cache holds {how.context} tokens, {context} are needed", "export a longer context")
    if arithmetic == "device":
        return Device(Path(path), how)
    return Evaluated(Path(path), how, arithmetic, threads, 0 if frugal else HOLD)


def on_mac() -> bool:
    """Whether Core ML itself is here."""
    return platform.system() == "Darwin"


class CoreMLModel(ABC):
    """A stateful language model; its subclasses say who computes."""

    name: str
    arithmetic: runtime.Arithmetic

    def __init__(self, how: Feeds) -> None:
        self._feeds = how
        self.laps = runtime.Laps()

    @abstractmethod
    def make_state(self) -> Any:
        """An empty cache."""

    @abstractmethod
    def step(self, inputs: dict[str, NDArray], state: Any) -> NDArray[np.float32]:
        """Logits `[n, vocab]` for the inputs of one step; `state` is written to."""

    @abstractmethod
    def close(self) -> None:
        """Free what was loaded."""

    def hidden(self, tokens: Sequence[int]) -> list[NDArray[np.float32]] | None:
        """None: only the evaluator shows what is inside."""
        return None

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits `[len(tokens), vocab]`; the last few tokens go one at a time, as in decoding."""
        state, past = self.make_state(), 0
        ends = pieces(len(tokens))
        whole: NDArray[np.float32] | None = None
        for end in ends:
            inputs = self._feeds.at(tokens[past:end], past)
            with self.laps.lap(end - past):
                part = self.step(inputs, state)
            if whole is None:
                whole = np.empty((len(tokens), part.shape[-1]), np.float32)
            whole[past:end] = part
            past = end
        return np.empty((0, 0), np.float32) if whole is None else whole

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens after `tokens`, one at a time through the states."""
        state, past = self.make_state(), 0
        found: list[int] = []
        step = list(tokens)
        while len(found) < count:
            inputs = self._feeds.at(step, past)
            with self.laps.lap(len(step)):
                rows = self.step(inputs, state)
            found.append(int(rows[-1].argmax()))
            past, step = past + len(step), found[-1:]
        return found

    def tokenize(self, text: str) -> list[int] | None:
        """None: a package has no tokenizer of its own."""
        return None

    def habits(self) -> Habits | None:
        """None: whoever runs it has habits of their own."""
        return None

    def chat(self, layouts: Sequence[runtime.Layout]) -> list[str] | None:
        """None: and no chat template."""
        return None


def pieces(count: int) -> list[int]:
    """Where the steps of a sequence of `count` tokens end: chunks, then one token at a time."""
    bulk = max(count - SINGLE, 0)
    return [*range(CHUNK, bulk, CHUNK), *([bulk] if bulk else []), *range(bulk + 1, count + 1)]


class Evaluated(CoreMLModel):
    """A package evaluated in PyTorch."""

    def __init__(self, path: Path, how: Feeds, arithmetic: Arithmetic, threads: int, hold: int = HOLD) -> None:
        super().__init__(how)
        self.name = f"MIL evaluator of gemexport, PyTorch {torch.__version__}"
        self.arithmetic = "static-activations" if arithmetic == "f32" and activations(path) else arithmetic
        self._threads = threads
        self._observe: Observer | None = None
        with _threads(threads):
            self._program: Program | None = Program(path, arithmetic, hold=hold)

    def make_state(self) -> Any:
        assert self._program is not None
        return self._program.make_state()

    def step(self, inputs: dict[str, NDArray], state: Any) -> NDArray[np.float32]:
        assert self._program is not None
        # One token's work is too little to share out: threads would mostly wait for each other.
        count = next(iter(inputs.values())).shape[1]
        with _threads(self._threads if count > 1 else 1):
            found: NDArray[np.float32] = self._program.predict(inputs, state, self._observe)[LOGITS][0]
        return found

    def hidden(self, tokens: Sequence[int]) -> list[NDArray[np.float32]] | None:
        """What goes into the first layer and what each layer gives, `[layers + 1][n, hidden]`; None for other graphs.

        Known by the norms that read it, which are called as in a checkpoint.
        """
        assert self._program is not None
        names = residuals(self._program.package)
        parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}

        def keep(_: str, name: str, value: torch.Tensor) -> None:
            if name in parts:
                parts[name].append(value[0].float().numpy().copy())

        self._observe = keep
        try:
            self.logits(tokens)
        finally:
            self._observe = None
        return [np.concatenate(parts[name]) for name in names] if names and all(parts.values()) else None

    def close(self) -> None:
        self._program = None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def residuals(package: Package) -> list[str]:
    """The values that the norms before each layer and the last norm read, in order; empty for other programs."""
    made = {output.name: operation for operation in package.operations for output in operation.outputs}

    def read(operation: Any, name: str) -> str:
        found: str = operation.inputs[name].arguments[0].name
        return found

    norms = {}
    for operation in package.operations:
        if operation.type == "mul" and (name := canonical_name(read(operation, "y"))) is not None:
            inner = made.get(read(operation, "x"))
            if inner is not None and inner.type == "mul":
                norms[name] = read(inner, "x")
    return in_order(norms)


class Device(CoreMLModel):
    """A package run by Core ML itself, on the CPU and GPU of a Mac."""

    def __init__(self, path: Path, how: Feeds) -> None:
        super().__init__(how)
        if not on_mac():
            raise InputError(path, "Core ML runs on macOS only", "use the evaluator: arithmetic f32 or f16")
        ct = coremltools()
        self._model: Any = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit.CPU_AND_GPU)
        self.name = f"Core ML (coremltools {ct.__version__})"
        kinds = {feature.type.multiArrayType.dataType for feature in self._model.get_spec().description.output}
        self.arithmetic = "f32" if kinds == {ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32} else "f16"

    def make_state(self) -> Any:
        return self._model.make_state()

    def step(self, inputs: dict[str, NDArray], state: Any) -> NDArray[np.float32]:
        return np.asarray(self._model.predict(inputs, state)[LOGITS][0], np.float32)

    def close(self) -> None:
        self._model = None


@dataclass(frozen=True)
class Range:
    """The largest finite or infinite magnitude that one operation gave."""

    kind: str
    name: str
    declared: str  # the type the program gives it
    largest: float


def ranges(path: str | Path, tokens: Sequence[int], arithmetic: Arithmetic = "f32") -> list[Range]:
    """What every floating-point operation of a language model reaches on `tokens`, largest first: where f16 ends."""
    package = open_package(path)
    program = Program(path, arithmetic)
    declared = {name: kind.kind for step in program.steps for name, kind in zip(step.outputs, step.types, strict=True)}
    found: list[Range] = []

    def observe(kind: str, name: str, value: torch.Tensor) -> None:
        if value.is_floating_point() and value.numel():
            found.append(Range(kind, name, declared[name], float(value.abs().max())))

    program.predict(feeds(package).at(tokens, 0), None, observe)
    return sorted(found, key=lambda item: -item.largest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Continue a text greedily, with the tokenizer that lies beside the package; 2 when the request is at fault."""
    parser = argparse.ArgumentParser(
        "python -P -m gemexport.validators.runtimes.coreml", description="Continue a text."
    )
    parser.add_argument("package", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=32, help="how many to generate")
    default = "device" if on_mac() else "f32"
    parser.add_argument("--arithmetic", choices=("f32", "f16", "device"), default=default)
    asked = parser.parse_args(arguments)
    try:
        from tokenizers import Tokenizer

        beside = asked.package.parent / "tokenizer.json"
        if not beside.is_file():
            raise InputError(beside, "there is no tokenizer beside the package", "copy the checkpoint's there")
        tokenizer = Tokenizer.from_file(str(beside))
        tokens = tokenizer.encode(asked.prompt).ids
        threads, context = torch.get_num_threads(), len(tokens) + asked.tokens
        model = load(asked.package, threads=threads, context=context, arithmetic=asked.arithmetic)
        print(asked.prompt + tokenizer.decode(model.greedy(tokens, asked.tokens)))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
