"""The validator of one artefact: a step of a run, in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.pieces import Pieces, whole
from gemexport.formats.tensor import Tensor
from gemexport.judge.attempts import Attempts
from gemexport.judge.facts import activation_differences, differences
from gemexport.judge.masks import mask_differences
from gemexport.judge.settings import setting_differences
from gemexport.judge.speed import Stopwatch
from gemexport.judge.structure import Structure, judged_structure
from gemexport.judge.tables import table_differences
from gemexport.judge.trial import Run, Trial, Try
from gemexport.judge.wording import Wordings, check_wording
from gemexport.registry import TARGETS, Target
from gemexport.shared.measured import LogitsReport, TensorReport, Validation, WeightsReport
from gemexport.shared.place import Asked, Place, Progress, opened
from gemexport.shared.unfinished import Unfinished
from gemexport.shared.vectors import VectorsReport
from gemexport.validators.checks import weights
from gemexport.validators.checks.folds import folded

MISSING = "tensors are missing, and nothing runs without them"
NO_ROOM = "the model does not fit into --memory"


def validate(
    place: Place,
    target: str,
    path: Path,
    run_logits: bool,
    progress: Progress,
    asked: Asked | None = None,
    frugal: bool = False,
    failed: str | None = None,
) -> Validation:
    """Weights, metadata, tokenizer, chat template and logits of one artefact.

    `asked` is what the exporter was asked for; None where somebody else may have made the artefact. `frugal`: its
    program takes as little memory as it can, and others are not tried. `failed` is how the reference ended, where it
    gave no logits. Progress in weights, and as many for all sequences. InputError where the artefact cannot be read;
    any other part that cannot be judged leaves the rest (`Validation.unjudged`), one that takes the process along too.
    """
    attempts, unfinished = Attempts(), Unfinished.of(place.work, path)
    unfinished.forget()
    judging = _Judging(place, TARGETS[target], path, attempts, unfinished, frugal)
    with judging.watch.time("weights"):
        report, digest = check_weights(place, target, path, progress, asked)
    checkpoint = place.open()
    stated = attempts.make("metadata", lambda: check_facts(checkpoint, target, path)) or Structure()
    judging.found = Validation(
        report, facts=stated.differences, notes=stated.notes, played=TARGETS[target].played,
        steps=judging.watch.seconds,
    )  # fmt: skip
    if report.missing:
        attempts.leave_out(checkpoint.model.gives, MISSING)
    elif failed is not None:
        attempts.fail(checkpoint.model.gives, f"the reference did not succeed: {failed}")
    elif not run_logits:
        attempts.leave_out(checkpoint.model.gives, NO_ROOM)
    else:
        judging.run(checkpoint, digest, progress)
    judging.words(checkpoint)
    return judging.told()


@dataclass
class _Judging:
    """What was found of an artefact so far; what is found is kept before the next program may end the process."""

    place: Place
    target: Target
    path: Path
    attempts: Attempts
    unfinished: Unfinished
    frugal: bool = False
    watch: Stopwatch = field(default_factory=Stopwatch)
    found: Validation | None = None
    wording: Wordings | None = None

    def told(self) -> Validation:
        """What was found, and what was not judged."""
        assert self.found is not None
        tokenizer, chat = self.wording or (None, None)
        return replace(self.found, tokenizer=tokenizer, chat=chat, unjudged=self.attempts.unjudged)

    def run(self, checkpoint: Checkpoint, digest: str, progress: Progress) -> None:
        """The artefact in its own program, in each arithmetic, then in the others that take it."""
        assert self.found is not None
        part = checkpoint.model.gives
        self.unfinished.keep(self.told(), ("tokenizer", "chat", part))
        given = (self.place, checkpoint, self.target, self.path, digest, self.watch, self.attempts, self.frugal)
        trial = self.attempts.make(part, partial(Trial, *given))
        if trial is None:
            return
        self.found = replace(self.found, played=trial.played)
        try:
            first = _Program(self.target.adapter(), self.target.arithmetics, part)
            runs = self._judged(trial, first, progress)
            self.wording = trial.wording
            self._add(runs, trial)
            for adapter in self.target.seconds(self.path):
                part = f"{checkpoint.model.gives} in {adapter.__name__.rpartition('.')[2]}"
                if self.frugal:
                    self.attempts.leave_out(part, NO_ROOM)
                    continue
                self.unfinished.keep(self.told(), (part,))
                self._add(self._judged(trial, _Program(adapter, (None,), part), _uncounted), trial)
        finally:
            trial.close()

    def _add(self, runs: Sequence[Run], trial: Trial) -> None:
        """Put what a program gave to what was found, after what those before gave."""
        assert self.found is not None
        found = self.found
        of_logits = [run for run in (found.logits, *found.more_logits, *runs) if isinstance(run, LogitsReport)]
        self.found = replace(
            found,
            logits=next(iter(of_logits), None),
            more_logits=tuple(of_logits[1:]),
            vectors=(*found.vectors, *(run for run in runs if isinstance(run, VectorsReport))),
            departs=trial.departs,
        )

    def _judged(self, trial: Trial, program: _Program, progress: Progress) -> list[Run]:
        """What a program gave, in the arithmetics that it takes, against both references."""
        tries: list[Try] = []
        for arithmetic in program.arithmetics:
            part = program.part if arithmetic is None else f"{program.part} in {arithmetic}"
            tried = self.attempts.make(part, partial(trial.run, program.adapter, arithmetic, progress))
            tries += [] if tried is None else [tried]
        return self.attempts.make(program.part, lambda: trial.judge(tries)) or [] if tries else []

    def words(self, checkpoint: Checkpoint) -> None:
        """Tokenizer and chat template without a program, where none has judged them."""
        if self.wording is None:
            self.unfinished.keep(self.told(), ("tokenizer", "chat"))
            with self.watch.time("tokenizer"):
                self.wording = check_wording(self.attempts, self.place.work, checkpoint, self.path, None)


@dataclass(frozen=True)
class _Program:
    """One that the artefact is run in, what it is asked to compute in, and what it judges."""

    adapter: ModuleType
    arithmetics: tuple[str | None, ...]
    part: str


def _uncounted(_: int) -> None:
    """The progress of a program that may not be here, and is not counted on."""


def check_weights(
    place: Place, target: str, path: Path, progress: Progress, asked: Asked | None = None
) -> tuple[WeightsReport, str]:
    """The weights of an artefact against the source's and what was promised, and a digest of the values read back."""
    stored: dict[str, Tensor] = dict(TARGETS[target].reader().tensors(path))
    checkpoint = place.open()
    if asked is None:
        promises = TARGETS[target].promises(checkpoint, TARGETS[target].variants[0], {})
    else:
        promises = TARGETS[target].promises(opened(place, checkpoint)[0], asked.variant, asked.options)
    source: dict[str, Tensor] = dict(checkpoint.tensors)
    for name, (original, tensor) in TARGETS[target].derived(path).items():
        if name not in source:
            stored[name] = tensor
            if original in source:
                source[name] = Pieces(name, source[original].shape, [whole(source[original])])
    folds: dict[str, Tensor] = {}
    if asked is None:
        folds = folded(source, stored, checkpoint.model.specs, checkpoint.architecture.norm_offset)
        source |= folds
        promises = {name: item for name, item in promises.items() if name not in folds}
    found = weights.compare(source, stored, progress, promises=promises, ours=asked is not None)
    tensors = tuple(TensorReport.model_validate(item, from_attributes=True) for item in found.tensors)
    compared, exact = sum(item.compared for item in tensors), sum(item.exact for item in tensors)
    report = WeightsReport(
        compared=compared,
        exact=exact,
        exact_fraction=exact / max(compared, 1),
        max_relative_error=max((item.max_relative_error for item in tensors), default=0.0),
        missing=found.missing,
        unexpected=found.unexpected,
        folded=tuple(folds),
        tensors=tensors,
    )
    return report, found.digest


def check_facts(checkpoint: Checkpoint, target: str, path: Path) -> Structure:
    """What the artefact states of the decoder and of its static activation scales otherwise than the checkpoint.

    That is what metadata and settings say, and what a graph computes; with notes on what of that was not judged.
    """
    stated = differences(target, path, checkpoint.model)
    decoder = checkpoint.architecture
    stated += setting_differences(checkpoint, path)
    stated += table_differences(target, path, decoder) + mask_differences(target, path)
    computed, notes = judged_structure(target, path, decoder)
    stated += computed + activation_differences(checkpoint.activations, TARGETS[target].activations(path))
    return Structure(stated, notes)
