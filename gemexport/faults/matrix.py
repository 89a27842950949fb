"""The matrix of faults and formats: every fault put into an artefact of every format, each judged by the validator.

`judge` calls the very steps that a run calls (gemexport.engine.steps, gemexport.judge.validation), in this process,
with one reference for all cells.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np

from gemexport.engine import rounding
from gemexport.engine import steps as nodes
from gemexport.faults import experts, weights
from gemexport.faults.folders import TOKENIZER
from gemexport.faults.sources import SOURCES, Source
from gemexport.faults.weights import Fault, Harmless, Inapplicable, Subject
from gemexport.formats.grids.recipe import RECIPES
from gemexport.formats.storage.errors import InputError
from gemexport.judge import validation
from gemexport.judge.attempts import Attempts
from gemexport.judge.verdict import bounds
from gemexport.judge.wording import check_wording
from gemexport.registry import TARGETS
from gemexport.report.schema import verdict
from gemexport.shared.measured import Divergence, Validation
from gemexport.shared.place import Asked, Place
from gemexport.shared.vectors import VectorDistance
from gemexport.validators.runtimes.protocol import TopLogits

COLUMNS = (
    ("gguf", "Q4_0"), ("mlx", "4bit"), ("onnx", "int4"), ("onnx", "npu"), ("coreml", "int4"),
    ("compressed-tensors", "w4a16"),
)  # fmt: skip
MODULES = {"gguf": "gguf", "mlx": "folders", "compressed-tensors": "folders", "onnx": "onnx", "coreml": "coreml"}
OF_EXPERTS = (*experts.FAULTS, "one expert more chosen")  # which is made otherwise in each format
ACTIVATIONS = ("activation scale doubled", "activation zero point off by one")  # of a mobile checkpoint
OF_THE_OPERATOR = {
    "KV cache written one position late": "ONNX Runtime's operator writes the cache",
    "mask -20 for -inf": "ONNX Runtime's operator masks",
}
PARTS = {
    "weights": "weights", "metadata": "metadata", "tokenizer": "tokenizer", "chat": "chat template",
    "conversion": "logits", "loss": "loss", "greedy": "greedy decoding",
}  # fmt: skip
TOKENS = 80  # of the tests' models, whose sliding window is 8
# What four bits cost a random model is no fault, and catches none.
RECIPE = RECIPES["default"].model_copy(update={"max_kld": math.inf})


@dataclass(frozen=True)
class Cell:
    """One fault in one format: caught with a reason, missed, or not applicable and why."""

    fault: str
    target: str
    variant: str
    caught: bool | None  # None: not applicable
    reason: str
    named: str = ""  # what the reason should name
    same: bool = False  # not caught, and every logit of the program was the same bits as without the fault

    @property
    def text(self) -> str:
        """The cell as a table has it: what caught it."""
        if self.same:
            return "no output changes"
        return "—" if self.caught is None else f"caught: {self.by}" if self.caught else "MISSED"

    @property
    def by(self) -> str:
        """Which part of the validator: that of the first bound that did not hold, `reading` when a file is refused."""
        part = self.reason.partition(".")[0]
        return PARTS.get(part, "reading")


@dataclass
class Bench:
    """A model, its clean artefacts, and what all cells share."""

    model: Path
    work: Path
    tokens: int = TOKENS
    source: Source = "lattice"  # what the model is, and what a model with experts is to be
    whole: bool = False  # run the artefact even if weights and metadata have shown the fault
    floors: dict[str, Divergence | VectorDistance] = field(default_factory=dict)
    _mobile: Bench | None = None
    _mixture: Bench | None = None

    def __post_init__(self) -> None:
        self.place = Place(self.model, self.work, self.tokens)
        self.work.mkdir(parents=True, exist_ok=True)
        found = nodes.grids(self.place, RECIPE, lambda _: None)
        if rounding.candidates(found, self.place.plain().model):
            rounding.round_linears(self.place, RECIPE, None, lambda _: None)
        self.checkpoint = self.place.open()

    def clean(self, target: str, variant: str) -> Path:
        """The artefact without a fault, exported once."""
        path = TARGETS[target].path(self.work / "clean", "model", variant)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            nodes.export(self.place, target, variant, path, {}, lambda _: None)
        return path

    def broken(self, target: str, variant: str, fault: Fault) -> tuple[Path, str]:
        """A copy of the artefact with the fault in it, and what a verdict must name."""
        clean = self.clean(target, variant)
        path = self.work / "broken" / target / variant / clean.name
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir(parents=True)
        (shutil.copytree if clean.is_dir() else shutil.copyfile)(clean, path)
        for file in clean.parent.glob("*.json"):  # a Core ML package has its tokenizer beside it
            shutil.copyfile(file, path.parent / file.name)
        make = fault.make if isinstance(fault, Harmless) else fault
        return path, str(make(Subject(target, path, self.checkpoint.model)))

    def judge(self, target: str, variant: str, path: Path, wording: bool = False) -> tuple[str, str]:
        """Status and reason, as `gemexport validate` gives them; `wording`: try the tokenizer before the runtime."""
        if not self.whole:
            try:
                status, reason = self._verdict(target, variant, self._stored(target, variant, path, wording))
            except InputError as error:
                return "error", str(error)
            if status in ("fail", "error"):
                return status, reason
        return self.measure(target, variant, path)[1:]

    def measure(self, target: str, variant: str, path: Path) -> tuple[Validation | None, str, str]:
        """What a validation measures, none where the artefact cannot be read, then status and reason."""
        self._measure_floors()
        try:
            found = validation.validate(self.place, target, path, True, lambda _: None, Asked(variant))
        except InputError as error:
            return None, "error", str(error)
        return found, *self._verdict(target, variant, found)

    def _stored(self, target: str, variant: str, path: Path, wording: bool) -> Validation:
        """What shows without running the artefact."""
        report, _ = validation.check_weights(self.place, target, path, lambda _: None, Asked(variant))
        facts = validation.check_facts(self.checkpoint, target, path).differences
        attempts = Attempts()
        words = check_wording(attempts, self.work, self.checkpoint, path, None) if wording else (None, None)
        return Validation(report, *words, facts=facts, unjudged=attempts.unjudged)

    def _measure_floors(self) -> None:
        """What PyTorch's other arithmetics differ by, once."""
        if not self.floors:
            noises = {noise for item in TARGETS.values() for noise in (item.played, *item.noises)}
            self.floors = nodes.reference(self.place, tuple(sorted(noises)), lambda _: None)

    def _verdict(self, target: str, variant: str, found: Validation) -> tuple[str, str]:
        holds = TARGETS[target].holds(variant)
        status, reason = verdict(bounds(found, self.floors, RECIPE, holds), found.unjudged)
        return status, str(reason)

    def mobile(self) -> Bench:
        """The same of a model that comes with static scales of activations."""
        if self._mobile is None:
            model = self.work / "mobile-model"
            if not model.exists():
                SOURCES["mobile"](model)
            self._mobile = Bench(model, self.work / "mobile", self.tokens, "mobile", self.whole)
        return self._mobile

    def mixture(self) -> Bench:
        """The same of a model with experts."""
        if self._mixture is None:
            model = self.work / "mixture-model"
            if not model.exists():
                SOURCES[self.source](model, experts=True)
            self._mixture = Bench(model, self.work / "mixture", self.tokens, self.source, self.whole)
        return self._mixture

    def suited(self, name: str) -> Bench:
        """The bench of a model that has what a fault breaks."""
        if name in ACTIVATIONS and self.source != "mobile":
            return self.mobile()
        return self.mixture() if name in OF_EXPERTS else self

    def cell(self, name: str, target: str, variant: str) -> Cell:
        """Put one fault into one artefact and judge it."""
        fault = applicable(name, target, variant, self)
        if isinstance(fault, str):
            return Cell(name, target, variant, None, fault)
        bench = self.suited(name)
        try:
            path, named = bench.broken(target, variant, fault)
        except Inapplicable as nothing:
            return Cell(name, target, variant, None, str(nothing))
        status, reason = bench.judge(target, variant, path, name in TOKENIZER)
        caught = status in ("fail", "error")
        if not caught and isinstance(fault, Harmless) and bench.same_logits(target, bench.clean(target, variant), path):
            return Cell(name, target, variant, None, fault.why, same=True)
        return Cell(name, target, variant, caught, reason, named)

    def same_logits(self, target: str, clean: Path, broken: Path) -> bool:
        """Whether the format's program makes the same bits of every token's logits of both artefacts."""
        tokens = self.place.sequences(self.checkpoint)[0]
        found = []
        for path in (clean, broken):
            runtime = TARGETS[target].adapter().load(path, threads=1, context=len(tokens) + 1)
            logits = runtime.logits(tokens)
            parts = (logits.ids, logits.logprobs) if isinstance(logits, TopLogits) else (logits,)
            found.append([np.array(part) for part in parts])
            runtime.close()
        return all(np.array_equal(one, other) for one, other in zip(*found, strict=True))

    def cells(
        self, columns: tuple[tuple[str, str], ...] = COLUMNS, names: Sequence[str] | None = None
    ) -> Iterator[Cell]:
        """The matrix, or of some faults, one column after the other."""
        for target, variant in columns:
            for name in catalogue() if names is None else names:
                yield self.cell(name, target, variant)


def catalogue() -> list[str]:
    """The names of all faults, those of the weights first."""
    return [*weights.FAULTS, *experts.FAULTS, *import_module("gemexport.faults.folders").FAULTS, *ACTIVATIONS]


def applicable(name: str, target: str, variant: str, bench: Bench) -> Fault | str:
    """The function that makes a fault in an artefact, or why there is none."""
    decoder, partial = bench.checkpoint.architecture, bench.checkpoint.model.family.partial_rope
    missing = {
        "layer scalar lost": not decoder.layer_scalar,
        "per-layer embedding shifted by a layer": decoder.per_layer is None,
        "RoPE partial factor wrong": not partial and target not in ("onnx", "coreml"),
        "soft cap lost": decoder.final_softcap is None,
        "tied head untied with noise": not decoder.tied,
        "shared KV layer reads the wrong donor": all(layer.owns_cache for layer in decoder.layers),
        **dict.fromkeys(OF_EXPERTS, bench.source == "mobile"),
    }
    if missing.get(name):
        return "the model has none"
    if name in ACTIVATIONS:
        if not TARGETS[target].computes_with_scales or (target, variant) == ("onnx", "int4"):
            return "it leaves static scales out"
        own: Fault | str = import_module(f"gemexport.faults.{MODULES[target]}").ACTIVATIONS[name]
        return own
    if name in weights.FAULTS or name in experts.FAULTS:
        return {**weights.FAULTS, **experts.FAULTS}[name]
    if (target, variant) == ("onnx", "int4") and name in OF_THE_OPERATOR:
        return OF_THE_OPERATOR[name]
    found: Fault | str = import_module(f"gemexport.faults.{MODULES[target]}").FAULTS[name]
    return found


def markdown(cells: list[Cell]) -> str:
    """The matrix as a table, a fault a row."""
    columns = list(dict.fromkeys((cell.target, cell.variant) for cell in cells))
    lines = [
        "| fault | " + " | ".join(" ".join(column) for column in columns) + " |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    for name in dict.fromkeys(cell.fault for cell in cells):
        row = {(cell.target, cell.variant): cell.text for cell in cells if cell.fault == name}
        lines.append(f"| {name} | " + " | ".join(row.get(column, "") for column in columns) + " |")
    return "\n".join(lines) + "\n"
