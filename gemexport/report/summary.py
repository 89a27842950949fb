"""The end of a run in a sentence for somebody who has never heard of KL divergence."""

from __future__ import annotations

from collections.abc import Sequence

from gemexport.registry import TARGETS
from gemexport.report.render import size
from gemexport.report.schema import ArtifactReport, Report


def closing(report: Report) -> str:
    """What is good and for whom, what each costs, and what is not good or not known."""
    known = [row for row in report.artifacts if row.format in TARGETS]
    good = [row for row in known if row.status == "pass"]
    bad = [row for row in known if row.status in ("fail", "error")]
    rest = [row for row in known if row.path is not None and row not in good and row not in bad]
    clauses = []
    if good:
        some = "all of them" if len(good) == len(known) else f"{len(good)} of {len(known)}"
        clauses.append(f"{some} can be used: {', '.join(map(_use, good))}")
    if bad:
        clauses.append(f"do not use {_named(bad)}, for the reason{'s' if len(bad) > 1 else ''} above")
    if rest:
        clauses.append(f"written, but not judged in full: {', '.join(map(_use, rest))}")
    return "; ".join(clauses) or "nothing was written"


def _use(row: ArtifactReport) -> str:
    """An artefact, who takes it, and what it costs against the model that it was made of."""
    costs = [size(row.bytes)] if row.bytes is not None else []
    loss = row.logits.loss if row.logits else None
    if loss is not None:
        costs.append(f"picks the same next word as your model {_often(loss.top1_agreement)}")
    told = f" ({', '.join(costs)})" if costs else ""
    return f"{row.path} for {TARGETS[row.format].users_of(row.variant)}{told}"


def _often(share: float) -> str:
    """A share as one says it; never `always` for less."""
    if share == 1:
        return "every time"
    return f"{min(int(share * 1000) / 10, 99.9):g} times in 100"


def _named(rows: Sequence[ArtifactReport]) -> str:
    return " and ".join(f"{row.format} {row.variant}" for row in rows)
