"""The validator of one artefact: a step of a run, in a process of its own."""

from __future__ import annotations

from pathlib import Path

from gemexport.formats.checkpoint import Checkpoint
from gemexport.judge.facts import activation_differences, differences
from gemexport.judge.speed import Stopwatch
from gemexport.judge.trial import Trial
from gemexport.judge.wording import check_wording
from gemexport.registry import TARGETS
from gemexport.shared.measured import (
    FactReport,
    TensorReport,
    Validation,
    WeightsReport,
)
from gemexport.shared.place import Asked, Place, Progress, opened
from gemexport.validators.checks import weights


def validate(
    place: Place,
    target: str,
    path: Path,
    run_logits: bool,
    progress: Progress,
    asked: Asked | None = None,
) -> Validation:
    """Weights, tokenizer and logits of one artefact; progress in weights, and as many for all sequences.

    `asked` is what the exporter was asked for; None where somebody else may have made the artefact.
    """
    watch = Stopwatch()
    with watch.time("weights"):
        report, digest = check_weights(place, target, path, progress, asked)
    checkpoint = place.open()
    facts = check_facts(checkpoint, target, path)
    if not run_logits or report.missing:
        with watch.time("tokenizer"):
            wording = check_wording(place.work, checkpoint, path, None)
        return Validation(report, *wording, facts=facts, steps=watch.seconds)
    trial = Trial(place, checkpoint, TARGETS[target], path, digest, watch)
    try:
        adapter, arithmetics = TARGETS[target].adapter(), TARGETS[target].arithmetics
        tries = [trial.run(adapter, arithmetic, progress) for arithmetic in arithmetics]
        tries += [trial.run(other, None, _uncounted) for other in TARGETS[target].seconds(path)]
        first, *more = trial.judge(tries)
    finally:
        trial.close()
    tokenizer_report, chat = trial.wording or (None, None)
    return Validation(
        report, tokenizer_report, chat, first, tuple(more), trial.departs, facts, TARGETS[target].played, watch.seconds
    )


def _uncounted(_: int) -> None:
    """The progress of a program that may not be here, and is not counted on."""


def check_weights(
    place: Place, target: str, path: Path, progress: Progress, asked: Asked | None = None
) -> tuple[WeightsReport, str]:
    """The weights of an artefact against the source's and what was promised, and a digest of the values read back."""
    stored = TARGETS[target].reader().tensors(path)
    checkpoint = place.open()
    if asked is None:
        promises = TARGETS[target].promises(checkpoint, TARGETS[target].variants[0], {})
    else:
        promises = TARGETS[target].promises(opened(place, checkpoint)[0], asked.variant, asked.options)
    found = weights.compare(checkpoint.tensors, stored, progress, promises=promises, ours=asked is not None)
    tensors = tuple(TensorReport.model_validate(item, from_attributes=True) for item in found.tensors)
    compared, exact = sum(item.compared for item in tensors), sum(item.exact for item in tensors)
    report = WeightsReport(
        compared=compared,
        exact=exact,
        exact_fraction=exact / max(compared, 1),
        max_relative_error=max((item.max_relative_error for item in tensors), default=0.0),
        missing=found.missing,
        unexpected=found.unexpected,
        tensors=tensors,
    )
    return report, found.digest


def check_facts(checkpoint: Checkpoint, target: str, path: Path) -> tuple[FactReport, ...]:
    """What the artefact states of the decoder and of its static activation scales otherwise than the checkpoint."""
    stated = differences(target, path, checkpoint.model)
    return stated + activation_differences(checkpoint.activations, TARGETS[target].activations(path))
