"""Artefacts without a fault, over families, kinds of weights, shapes, recipes and formats.

Nothing may be said of any of them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gemexport import demo
from gemexport.demo import mobile
from gemexport.demo.qat import RULES
from gemexport.engine import rounding
from gemexport.engine import steps as nodes
from gemexport.faults.matrix import COLUMNS
from gemexport.faults.places import PLACES
from gemexport.faults.stored import Numbers, floats, like
from gemexport.formats.gemma.names import FINAL_NORM
from gemexport.formats.gemma.roles import Role
from gemexport.formats.grids.recipe import RECIPES, Recipe
from gemexport.formats.tensor import DType
from gemexport.judge import validation
from gemexport.judge.verdict import bounds
from gemexport.registry import TARGETS
from gemexport.shared.measured import Divergence, LogitsReport, Validation
from gemexport.shared.place import Asked, Place
from gemexport.shared.vectors import VectorDistance

Kind = Literal["lattice", "plain", "partly", "mobile"]
KINDS: tuple[Kind, ...] = ("lattice", "plain", "partly", "mobile")
LEFT_PLAIN = ((Role.UP, Role.K), (Role.EMBEDDING,), (Role.DOWN, Role.O, Role.PER_LAYER_EMBEDDING))
DTYPES: tuple[DType, ...] = ("bf16", "bf16", "bf16", "f16", "f32")
Column = tuple[str, str, dict[str, Any]]  # a format, a variant, options of its exporter
# Beside what is written by default: two of these for every model.
FURTHER: tuple[Column, ...] = (
    ("gguf", "Q8_0", {}), ("gguf", "BF16", {}), ("gguf", "F32", {}), ("gguf", "Q4_K_M", {}), ("gguf", "Q6_K", {}),
    ("mlx", "4bit", {"scales": "f32"}), ("mlx", "4bit", {"scales": "f16"}), ("mlx", "bf16", {}), ("mlx", "f32", {}),
    ("onnx", "npu-a8", {}), ("onnx", "npu-a16", {}), ("onnx", "f32", {}), ("coreml", "f16", {}),
    ("coreml", "f32", {}), ("compressed-tensors", "w4a16", {"pack_embeddings": True}),
    ("compressed-tensors", "w4a16", {"pack_embeddings": False}), ("compressed-tensors", "bf16", {}),
)  # fmt: skip
NOISE = (0.001, 0.1)  # nats, mean, of PyTorch's bf16: where released models lie
TRIES = 8  # each comes nearer: a soft cap takes some of it back
ANY_LOSS = 50.0  # nats: what four bits cost a random model is no fault


@dataclass(frozen=True)
class Model:
    """What is drawn for a seed."""

    seed: int
    family: demo.FamilyName
    kind: Kind
    size: demo.Size
    recipe: Recipe
    rule: str | None = None
    plain: tuple[Role, ...] = ()
    experts: bool = False
    dtype: DType = "bf16"

    def __str__(self) -> str:
        size = self.size
        what = "experts" if self.experts else ", ".join(role.label for role in self.plain)
        words = (self.family, self.kind, self.rule, self.dtype, what, f"recipe {self.recipe.name}")
        shape = f"{size.hidden}/{size.intermediate}, {size.heads}:{size.kv_heads} × {size.head_dim}"
        return f"{', '.join(filter(None, words))}, {shape}"


@dataclass(frozen=True)
class Clean:
    """A fault-free artefact and what the validator said of it: the bounds that it broke."""

    model: Model
    target: str
    variant: str
    alarms: tuple[str, ...]
    logits: tuple[LogitsReport, ...] = ()
    noise: float | None = None  # of the model, where it was run


def random_size(stream: np.random.Generator) -> demo.Size:
    """A small decoder: widths, heads, head size and window drawn; every row is a whole number of blocks."""
    kv_heads = int(stream.integers(1, 3))
    vocab, hidden = int(stream.choice([512, 544, 640])), int(stream.choice([64, 96, 128]))
    intermediate, group = int(stream.choice([96, 128, 160])), int(stream.integers(1, 4))
    # transformers wants a whole number of heads in the width, although heads have a size of their own.
    while hidden % (kv_heads * group):
        group -= 1
    return demo.Size(
        vocab=vocab,
        hidden=hidden,
        intermediate=intermediate,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=int(stream.choice([32, 64])),
        per_layer=32,
        window=int(stream.integers(4, 24)),
    )


def drawn(seed: int) -> Model:
    """The model of a seed: the kinds come by turns, the rest by chance."""
    stream = np.random.default_rng(seed)
    size, kind = random_size(stream), KINDS[seed % len(KINDS)]
    recipe = RECIPES[str(stream.choice(sorted(RECIPES)))].model_copy(update={"max_kld": ANY_LOSS})
    if kind == "mobile":
        return Model(seed, "gemma4", kind, size, recipe)
    newer = bool(stream.random() < 0.5)
    family: demo.FamilyName = "gemma4" if newer else "gemma3"
    return Model(
        seed=seed,
        family=family,
        kind=kind,
        size=size,
        recipe=recipe.model_copy(update={"requantize_mixed": bool(stream.random() < 0.5)}),
        rule=None if kind == "plain" else str(stream.choice(RULES)),
        plain=LEFT_PLAIN[stream.integers(len(LEFT_PLAIN))] if kind == "partly" else (),
        experts=newer and bool(stream.random() < 0.3),
        dtype=DTYPES[stream.integers(len(DTYPES))],
    )


def columns_of(seed: int) -> list[Column]:
    """What is written of the model of a seed: the matrix' columns, and two more."""
    more = np.random.default_rng([seed, 1]).choice(len(FURTHER), 2, replace=False)
    return [*((*column, {}) for column in COLUMNS), *(FURTHER[index] for index in more)]


@dataclass
class Batch:
    """A model on disk and its artefacts."""

    model: Model
    folder: Path
    tokens: int
    floors: dict[str, Divergence | VectorDistance] = field(default_factory=dict)

    def __post_init__(self) -> None:
        drawn, source = self.model, self.folder / "model"
        if drawn.kind == "mobile":
            mobile.make(source, size=drawn.size, seed=drawn.seed)
        else:
            demo.make(
                source, family=drawn.family, size=drawn.size, seed=drawn.seed, rule=drawn.rule, plain=drawn.plain,
                experts=drawn.experts, dtype=drawn.dtype,
            )  # fmt: skip
        self.place = Place(source, self.folder / "work", self.tokens)

    def scaled(self) -> float:
        """What bf16 costs the model, in nats; its logits are scaled until that is as much as released ones show."""
        wanted = math.exp(np.random.default_rng([self.model.seed, 2]).uniform(*np.log(NOISE)))
        for tried in range(TRIES):
            noise = nodes.reference(self.place, ("bf16",), lambda _: None)["bf16"].mean
            shutil.rmtree(self.place.work, ignore_errors=True)
            reached = NOISE[0] <= noise <= NOISE[1] and wanted / 2 <= noise <= 2 * wanted
            if tried + 1 == TRIES or (tried and reached):
                break
            self._louder(math.sqrt(wanted / noise))
        return noise

    def _louder(self, factor: float) -> None:
        """Multiply what the last norm gives, and so the logits; their divergence goes by its square."""
        place, checkpoint = PLACES["mlx"](self.place.model, FINAL_NORM), self.place.plain()
        offset = np.float32(checkpoint.architecture.norm_offset)
        values: Numbers = place.read()
        values.codes = like((floats(values.codes) + offset) * np.float32(factor) - offset, values.codes)
        place.write(values)

    def prepare(self, columns: list[Column], run: bool) -> None:
        """Find the grids; where artefacts are `run`, round as a run does, and measure PyTorch's other arithmetics."""
        self.place.work.mkdir(parents=True, exist_ok=True)
        found = nodes.grids(self.place, self.model.recipe, lambda _: None)
        if run and self.model.recipe.rounding == "data" and rounding.candidates(found, self.place.plain().model):
            rounding.round_linears(self.place, self.model.recipe, None, lambda _: None)
        if run:
            noises = {noise for target, variant, _ in columns for noise in TARGETS[target].noises_of(variant)}
            self.floors = nodes.reference(self.place, tuple(sorted(noises)), lambda _: None)

    def judged(self, target: str, variant: str, options: dict[str, Any], run: bool) -> Validation:
        """Write an artefact and judge it; without `run` what shows without running it."""
        path = TARGETS[target].path(self.folder / "out", "model", variant)
        path.parent.mkdir(parents=True, exist_ok=True)
        if variant in TARGETS[target].calibrated:
            options = {**options, "calibration": [list(range(3, 67))]}
        nodes.export(self.place, target, variant, path, options, lambda _: None)
        asked = Asked(variant, options)
        if run:
            return validation.validate(self.place, target, path, True, lambda _: None, asked)
        weights, _ = validation.check_weights(self.place, target, path, lambda _: None, asked)
        return Validation(weights, facts=validation.check_facts(self.place.open(), target, path).differences)

    def alarms(self, target: str, variant: str, found: Validation) -> tuple[str, ...]:
        """The bounds that an artefact broke, and what was not judged of it."""
        format_ = TARGETS[target]
        recipe = self.model.recipe.model_copy(update={"max_kld": math.inf})  # what a format costs is no fault of it
        held = bounds(found, self.floors, recipe, format_.holds(variant), format_.plain(variant))
        return *(str(bound) for bound in held if not bound.held), *map(str, found.unjudged)


def fault_free(
    work: Path, seeds: range, tokens: int = 80, columns: tuple[tuple[str, str], ...] = (), run_every: int = 1
) -> Iterator[Clean]:
    """Make a model for each seed, export it into every column, judge each; `work` is left empty.

    One model in `run_every` is run in its programs, of the others weights and metadata are judged; without `columns` a
    model is written in those of the matrix and in two more.
    """
    for seed in seeds:
        folder, run = work / f"seed-{seed}", seed % run_every == 0
        batch = Batch(drawn(seed), folder, tokens)
        noise = batch.scaled() if run else None
        wanted: list[Column] = [(*column, {}) for column in columns] or columns_of(seed)
        decoder = batch.place.plain().model
        wanted = [column for column in wanted if TARGETS[column[0]].supports(decoder, column[1]) is None]
        batch.prepare(wanted, run)
        for target, variant, options in wanted:
            found = batch.judged(target, variant, options, run)
            logits = () if found.logits is None else (found.logits, *found.more_logits)
            label = " ".join([variant, *(f"{key}={value}" for key, value in options.items())])
            yield Clean(batch.model, target, label, batch.alarms(target, variant, found), logits, noise)
        shutil.rmtree(folder)
