"""Bounds and words of a model that makes one vector of a text."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gemexport.formats.grids.recipe import Recipe
from gemexport.judge.bounds import VECTOR_F32, VECTOR_LOSSES
from gemexport.judge.vectors import judged_vectors, vector_bounds, vector_limit, vector_loss_bounds, word
from gemexport.shared.measured import Validation, WeightsReport
from gemexport.shared.vectors import VectorDistance, VectorKind, VectorsReport

WEIGHTS = WeightsReport(compared=1, exact=1, exact_fraction=1.0, max_relative_error=0.0)


def distance(value: float, error: float | None = None, **more: object) -> VectorDistance:
    error = math.sqrt(2 * value) if error is None else error
    return VectorDistance.model_validate(
        {"distance_mean": value, "distance_max": value, "error_mean": error, "texts": 9, "spread": 0.5, **more}
    )


def run(conversion: VectorDistance, loss: VectorDistance, arithmetic: str = "f32") -> VectorsReport:
    return VectorsReport.model_validate(
        {"runtime": "R", "arithmetic": arithmetic, "texts": 9, "tokens": 99, "conversion": conversion, "loss": loss}
    )


def held(report: VectorsReport, floors: dict[str, VectorDistance]) -> list[bool]:
    return [bound.held for bound in vector_bounds(report, floors, Validation(WEIGHTS), "")]


def test_f32_is_held_to_what_pytorch_plays() -> None:
    floors = {"f32-reordered": distance(1e-9)}
    assert vector_limit(1e-9) == pytest.approx(5e-9)
    assert vector_limit(0.0) == vector_limit(None) == VECTOR_F32[0]
    assert vector_limit(1.0) == VECTOR_F32[1]
    assert held(run(distance(4e-9), distance(0.0)), floors) == [True, True]
    assert held(run(distance(6e-9), distance(0.0)), floors) == [False, False]
    assert held(run(distance(4e-9, error=0.1), distance(0.0)), floors) == [True, False]  # of another length
    assert held(run(distance(math.nan), distance(0.0)), floors) == [False, False]


def test_rounded_activations_are_held_to_their_noise() -> None:
    floors = {"bf16": distance(1e-5), "int8-activations": distance(1e-4)}
    assert held(run(distance(1.9e-4), distance(0.0), "int8-activations"), floors) == [True, True]
    assert held(run(distance(2.1e-4), distance(0.0), "int8-activations"), floors) == [False, False]


def test_a_word_goes_by_bf16_and_by_how_far_apart_texts_are() -> None:
    near, lossy = VECTOR_LOSSES[1][1], VECTOR_LOSSES[2][1]
    assert word(0.0, 0.0, 0.5) == "lossless"
    assert word(2e-5, 1e-5, 0.5) == "lossless"
    assert word(0.5 * near, 1e-5, 0.5) == "near"
    assert word(0.51 * near, 1e-5, 0.5) == "lossy"
    assert word(0.51 * lossy, 1e-5, 0.5) == "poor"
    assert word(math.nan, 1.0, 0.5) == "poor"


def test_the_kind_that_fares_worst_decides() -> None:
    def part(kind: str, value: float) -> VectorKind:
        return VectorKind(kind=kind, texts=3, distance_mean=value, distance_max=value, error_mean=0.0)

    loss = distance(0.03, kinds=(part("prose", 1e-6), part("code", 0.2)))
    found = replace(Validation(WEIGHTS), vectors=(run(distance(0.0), loss),))
    judged = judged_vectors(found, {"bf16": distance(1e-5, kinds=(part("prose", 1e-6), part("code", 1e-6)))})
    assert judged is not None
    assert (judged.word, judged.kind, judged.share) == ("poor", "code", 0.4)
    assert [part.word for part in judged.kinds] == ["lossless", "poor"]
    (bound,) = vector_loss_bounds(judged, Recipe(name="any"))
    assert not bound.held
    (bound,) = vector_loss_bounds(judged, Recipe(name="any", max_kld=0.04))
    assert bound.held
