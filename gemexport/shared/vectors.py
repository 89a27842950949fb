"""What validators measure of a model that makes one vector of a text, as data (docs/report.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemexport.shared.measured import Arithmetic, LossWord, ReportModel, SpeedReport

if TYPE_CHECKING:
    from gemexport.validators.checks import distance


class VectorFigures(ReportModel):
    """Two models on the same texts: `distance` is 1 - cosine, `error` the relative error of the vector."""

    distance_mean: float
    distance_max: float
    error_mean: float


class VectorKind(VectorFigures):
    """The same on one kind of text."""

    kind: str
    texts: int


class VectorDistance(VectorFigures):
    """The same over all texts, and by kind where they are of several.

    `spread` is the mean of 1 - cosine over pairs of texts in the reference: how far apart unrelated ones are.
    """

    texts: int
    spread: float | None = None
    kinds: tuple[VectorKind, ...] = ()

    @property
    def mean(self) -> float:
        """The figure that bounds are of."""
        return self.distance_mean

    @classmethod
    def of(cls, total: distance.Distance, kinds: Sequence[tuple[str, int]] = ()) -> VectorDistance:
        """The figures of what was added up over texts, whose kinds and lengths may be given."""
        whole = cls.model_validate(total, from_attributes=True)
        parts = [
            VectorKind(kind=kind, texts=part.texts, **dict(VectorFigures.model_validate(part, from_attributes=True)))
            for kind, part in total.by_kind(kinds).items()
        ]
        return whole.model_copy(update={"kinds": tuple(parts)})


class VectorKindLoss(ReportModel):
    """The loss on one kind of text in a word, beside what PyTorch's bf16 costs the source there (`noise`)."""

    kind: str
    texts: int
    word: LossWord
    distance_mean: float
    noise: float


class VectorLoss(ReportModel):
    """What an artefact's numbers cost, in a word: that of the kind of text which fares worst.

    `share` is that kind's distance over the `spread` of texts.
    """

    word: LossWord
    kind: str
    share: float
    spread: float
    distance_mean: float
    runtime: str
    arithmetic: Arithmetic
    kinds: tuple[VectorKindLoss, ...]


class VectorsReport(ReportModel):
    """An artefact run in a runtime, over `texts` texts, a vector each.

    `conversion` is against the reference holding the weights read back from the artefact, `loss` against the
    reference holding the source's; `noise_floor` is PyTorch's own bf16 against its f32 on the same texts.
    """

    runtime: str
    arithmetic: Arithmetic
    texts: int
    tokens: int
    conversion: VectorDistance
    loss: VectorDistance
    noise_floor: VectorDistance | None = None
    speed: SpeedReport | None = None
