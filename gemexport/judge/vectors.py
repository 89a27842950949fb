"""The bounds and the loss of a model that makes one vector of a text (docs/bounds.md).

1 - cosine is half the squared distance of two directions: as a KL divergence it grows with the square of what each
number is off by, so the multiples of what PyTorch plays are those of logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from gemexport.formats.grids.recipe import Recipe
from gemexport.judge.bounds import F32_FACTOR, LOSS_NOISE, NOISE_FACTOR, NOISES, VECTOR_F32, VECTOR_LOSSES
from gemexport.judge.loss import EXACT
from gemexport.shared.bound import Bound
from gemexport.shared.measured import LossWord, Validation
from gemexport.shared.vectors import VectorDistance, VectorKindLoss, VectorLoss, VectorsReport

ALL = "mixed"


def vector_limit(played: float | None) -> float:
    """The mean distance that a runtime in f32 is held to, where PyTorch playing it is off by `played`."""
    least, most = VECTOR_F32
    return least if played is None else min(max(F32_FACTOR * played, least), most)


def vector_bounds(
    run: VectorsReport, floors: Mapping[str, VectorDistance], found: Validation, program: str
) -> list[Bound]:
    """What a program's vectors are held to; `program` says in the bounds' names which, where it is not the first."""
    metric, distance = f"conversion.distance_mean in {run.arithmetic}{program}", run.conversion.distance_mean
    played = floors.get(found.played)
    if run.arithmetic == "f32":
        limit = vector_limit(None if played is None else played.distance_mean)
        origin = f"{F32_FACTOR:g} times what PyTorch in {found.played} differs from its f32 on the same texts"
        where = None if found.departs is None else str(found.departs)
    else:
        own = (found.played,) if run.arithmetic == "static-activations" else ()
        noises = {name: floors[name] for name in (*NOISES.get(run.arithmetic, ()), *own) if name in floors}
        if not noises:
            origin = "a number: nothing was measured that tells how far this arithmetic takes a right artefact"
            return [Bound.at_most(metric, distance, math.inf, origin)]
        noise, floor = max(noises.items(), key=lambda item: item[1].distance_mean)
        limit, where = NOISE_FACTOR * floor.distance_mean, None
        origin = f"{NOISE_FACTOR:g} times what PyTorch in {noise} differs from its f32 on the same texts"
    # Of vectors of length 1 the relative error is the root of twice the distance, and its mean no more than that of
    # the mean; beyond that is a vector of another length. Lengths are rounded in f32.
    error, length = run.conversion.error_mean, math.sqrt(2 * limit) + 1e-6
    return [
        Bound.at_most(metric, distance, limit, origin, where),
        Bound.at_most(
            f"conversion.error_mean in {run.arithmetic}{program}", error, length, "vectors have the length 1", where
        ),
    ]


def judged_vectors(found: Validation, floors: Mapping[str, VectorDistance]) -> VectorLoss | None:
    """The loss of an artefact in a word, where it was measured; `floors` has what bf16 costs the source."""
    if not found.vectors:
        return None
    run = min(found.vectors, key=lambda run: EXACT.index(run.arithmetic) if run.arithmetic in EXACT else len(EXACT))
    noise, spread = floors.get("bf16"), run.loss.spread or 1.0
    noises = {} if noise is None else {kind: value for kind, _, value in _parts(noise)}
    kinds = tuple(
        VectorKindLoss(kind=kind, texts=texts, distance_mean=value, noise=noises.get(kind, 0.0),
                       word=word(value, noises.get(kind, 0.0), spread))
        for kind, texts, value in _parts(run.loss)
    )  # fmt: skip
    words: list[LossWord] = [name for name, _ in VECTOR_LOSSES]
    worst = max(kinds, key=lambda part: (words.index(part.word), _order(part.distance_mean)))
    return VectorLoss(
        word=worst.word, kind=worst.kind, share=worst.distance_mean / spread, spread=spread,
        distance_mean=run.loss.distance_mean, runtime=run.runtime, arithmetic=run.arithmetic, kinds=kinds,
    )  # fmt: skip


def vector_loss_bounds(loss: VectorLoss, recipe: Recipe) -> list[Bound]:
    """The budget that somebody gave, which of vectors is one of 1 - cosine; else that the loss is not `poor`."""
    if recipe.max_kld is not None:
        origin = "the budget of --max-kld or of the recipe, which of vectors is one of 1 - cosine"
        return [Bound.at_most("loss.distance_mean", loss.distance_mean, recipe.max_kld, origin)]
    worst = max(loss.kinds, key=lambda part: _order(part.distance_mean))
    metric, limit = f"loss.share of {worst.kind} texts", VECTOR_LOSSES[-2][1]
    origin = "beyond it, of how far apart unrelated texts are, the loss is poor; --max-kld accepts a distance"
    return [Bound.at_most(metric, worst.distance_mean / loss.spread, limit, origin)]


def word(distance: float, noise: float, spread: float) -> LossWord:
    """The first word whose limit holds, given what bf16 costs and how far apart unrelated texts are."""
    if distance <= LOSS_NOISE * noise or distance == 0:
        return "lossless"
    return next((word for word, most in VECTOR_LOSSES[1:] if distance <= most * spread), "poor")


def _order(distance: float) -> float:
    return math.inf if math.isnan(distance) else distance


def _parts(figures: VectorDistance) -> list[tuple[str, int, float]]:
    """Kind, texts and mean distance, all as one where there is but one kind."""
    found = [(part.kind, part.texts, part.distance_mean) for part in figures.kinds]
    return found or [(ALL, figures.texts, figures.distance_mean)]
