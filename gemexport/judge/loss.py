"""What an artefact's numbers cost, in a word, by kind of text; the kind that fares worst decides (docs/bounds.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gemexport.formats.grids.recipe import Recipe
from gemexport.judge.bounds import CHANGED, LOSS_NOISE, LOSSES
from gemexport.shared.bound import Bound
from gemexport.shared.measured import (
    Divergence,
    KindLossReport,
    KindReport,
    LogitsReport,
    LossReport,
    LossWord,
    Validation,
)

# Arithmetics that add least of their own to what the numbers cost, first; all others come after these.
EXACT = ("f32", "static-activations", "f16", "bf16")
ALL = "mixed"  # the kind of texts that were too few to tell kinds apart


def judged_loss(found: Validation, floors: Mapping[str, Divergence]) -> LossReport | None:
    """The loss of an artefact in a word, where it was measured; `floors` has what bf16 costs the source.

    Of several runs that in which its program adds least of its own: what a program rounds is no loss of the artefact.
    """
    runs = [run for run in (found.logits, *found.more_logits) if run is not None and run.loss is not None]
    if not runs:
        return None
    run = min(runs, key=lambda run: EXACT.index(run.arithmetic) if run.arithmetic in EXACT else len(EXACT))
    assert run.loss is not None
    noises = {part.kind: part.kld_mean for part in _parts(floors["bf16"], run)} if "bf16" in floors else {}
    kinds = tuple(_kind(part, noises.get(part.kind, 0.0)) for part in _parts(run.loss, run))
    words: list[LossWord] = [word for word, _, _ in LOSSES]
    worst = max(kinds, key=lambda part: (words.index(part.word), _order(part.kld_mean)))
    return LossReport(
        word=worst.word, kind=worst.kind, kld_mean=run.loss.kld_mean, runtime=run.runtime, arithmetic=run.arithmetic,
        kinds=kinds, choice_mean=run.loss.choice_mean, choice_max=run.loss.choice_max,
    )  # fmt: skip


def loss_bounds(report: LossReport, recipe: Recipe, sound: bool = True) -> list[Bound]:
    """What the loss is held to: the budget that somebody gave, else that it is not `poor`.

    How that is accepted is said of an artefact that is `sound` otherwise: the loss of another follows from its fault.
    """
    if recipe.max_kld is not None:
        origin = "the budget of --max-kld or of the recipe"
        return [Bound.at_most("loss.kld_mean", report.kld_mean, recipe.max_kld, origin)]
    _, kld, changed = LOSSES[-2]
    origin = "beyond it the loss is poor"
    finite = math.isfinite(report.kld_mean)
    accepted = f"validate --max-kld {_rounded_up(report.kld_mean)} accepts it" if sound and finite else None
    by_kld = max(report.kinds, key=lambda part: _order(part.kld_mean))
    by_changed = max(report.kinds, key=lambda part: part.changed)
    return [
        Bound.at_most(f"loss.kld_mean of {by_kld.kind} texts", by_kld.kld_mean, kld, origin, accepted),
        Bound.at_most(f"loss.changed of {by_changed.kind} texts", by_changed.changed, changed, origin, accepted),
    ]


def _parts(figures: Divergence, run: LogitsReport) -> tuple[KindReport, ...]:
    """By kind, or all as one where there is but one."""
    if figures.kinds:
        return figures.kinds
    whole = figures.model_dump(include=set(KindReport.model_fields))
    return (KindReport(kind=ALL, tokens=run.tokens, **whole),)


def _kind(part: KindReport, noise: float) -> KindLossReport:
    changed = part.changed if part.changed is not None else 1 - part.top1_agreement
    return KindLossReport(
        kind=part.kind, tokens=part.tokens, word=word(part.kld_mean, changed, noise), kld_mean=part.kld_mean,
        changed=changed, noise=noise,
    )  # fmt: skip


def word(kld: float, changed: float, noise: float) -> LossWord:
    """The first word whose limits hold: nats, the share of tokens that changed, and the nats that bf16 costs."""
    if (kld <= LOSS_NOISE * noise and changed <= CHANGED) or kld == 0:
        return "lossless"
    return next((word for word, most, share in LOSSES[1:] if kld <= most and changed <= share), "poor")


def _order(kld: float) -> float:
    return math.inf if math.isnan(kld) else kld


def _rounded_up(kld: float) -> str:
    """Two digits that are no less."""
    if kld == 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(kld)) - 1)
    return f"{math.ceil(kld / step) * step:.2g}"
