"""What a loss is called, which run and which kind of text decide it, and what it is held to."""

from __future__ import annotations

import math

import pytest

from gemexport.formats.grids.recipe import load_recipe
from gemexport.judge.loss import judged_loss, loss_bounds, word
from gemexport.shared.measured import Arithmetic, Divergence, KindReport, LogitsReport, Validation, WeightsReport

WEIGHTS = WeightsReport(compared=0, exact=0, exact_fraction=1.0, max_relative_error=0.0)
DEFAULT = load_recipe("default")


def figures(kld: float, changed: float = 0.0, **kinds: tuple[float, float]) -> Divergence:
    parts = tuple(
        KindReport(kind=name, tokens=104, kld_mean=nats, kld_max=nats, top1_agreement=0.5, changed=share,
                   perplexity_ratio=1.0)
        for name, (nats, share) in kinds.items()
    )  # fmt: skip
    return Divergence(kld_mean=kld, kld_max=kld, top1_agreement=0.5, changed=changed, perplexity_ratio=1.0, kinds=parts)


def run(loss: Divergence, arithmetic: Arithmetic = "f32", name: str = "x") -> LogitsReport:
    return LogitsReport(runtime=name, arithmetic=arithmetic, tokens=512, loss=loss)


@pytest.mark.parametrize(
    ("kld", "changed", "noise", "expected"),
    [(0.0, 0.0, 0.0, "lossless"), (0.0019, 0.02, 0.001, "lossless"), (0.0021, 0.02, 0.001, "near"),
     (0.0019, 0.04, 0.001, "near"), (0.02, 0.05, 0.0, "near"), (0.02, 0.06, 0.0, "lossy"), (0.021, 0.0, 0.0, "lossy"),
     (0.25, 0.3, 0.0, "lossy"), (0.26, 0.0, 0.0, "poor"), (0.1, 0.31, 0.0, "poor"), (math.nan, 0.0, 1.0, "poor")],
)  # fmt: skip
def test_the_word_follows_from_nats_and_from_tokens_that_changed(
    kld: float, changed: float, noise: float, expected: str
) -> None:
    assert word(kld, changed, noise) == expected


def test_the_kind_that_fares_worst_decides_beside_its_own_noise() -> None:
    loss = figures(0.004, document=(0.0019, 0.0), prose=(0.001, 0.0), code=(0.003, 0.0), scripts=(0.009, 0.0))
    noise = figures(0.002, document=(0.001, 0.0), prose=(0.001, 0.0), code=(0.001, 0.0), scripts=(0.005, 0.0))
    found = judged_loss(Validation(WEIGHTS, logits=run(loss)), {"bf16": noise})
    assert found is not None
    assert [(part.kind, part.word) for part in found.kinds] == [
        ("document", "lossless"), ("prose", "lossless"), ("code", "near"), ("scripts", "lossless"),
    ]  # fmt: skip
    assert (found.word, found.kind, found.kld_mean) == ("near", "code", 0.004)


def test_what_a_program_rounds_is_no_loss_of_the_artefact() -> None:
    rounded, exact = run(figures(0.4, 0.4), "int8-activations", "llama.cpp"), run(figures(0.001), "f32", "llama.cpp")
    other = run(figures(0.3), "f32", "OpenVINO")
    found = judged_loss(Validation(WEIGHTS, logits=rounded, more_logits=(exact, other)), {"bf16": figures(0.001)})
    assert found is not None
    assert (found.word, found.runtime, found.arithmetic) == ("lossless", "llama.cpp", "f32")
    only = judged_loss(Validation(WEIGHTS, logits=rounded), {})
    assert only is not None
    assert (only.word, only.kind) == ("poor", "mixed")
    assert judged_loss(Validation(WEIGHTS), {}) is None


def test_a_poor_loss_is_broken_and_says_what_accepts_it() -> None:
    found = judged_loss(Validation(WEIGHTS, logits=run(figures(0.333, 0.2, prose=(0.2, 0.1), code=(0.41, 0.4)))), {})
    assert found is not None
    broken = [str(bound) for bound in loss_bounds(found, DEFAULT) if not bound.held]
    assert broken == [
        "loss.kld_mean of code texts is 0.41, not <= 0.25 (beyond it the loss is poor): "
        "validate --max-kld 0.34 accepts it",
        "loss.changed of code texts is 0.4, not <= 0.3 (beyond it the loss is poor): "
        "validate --max-kld 0.34 accepts it",
    ]
    assert all(bound.where is None for bound in loss_bounds(found, DEFAULT, sound=False))
    (accepted,) = loss_bounds(found, DEFAULT.model_copy(update={"max_kld": 0.34}))
    assert accepted.held
    (tight,) = loss_bounds(found, DEFAULT.model_copy(update={"max_kld": 0.3}))
    assert not tight.held


def test_a_loss_that_is_no_number_is_poor_and_nothing_accepts_it() -> None:
    found = judged_loss(Validation(WEIGHTS, logits=run(figures(math.nan, 1.0))), {"bf16": figures(0.1)})
    assert found is not None
    assert found.word == "poor"
    assert [(bound.held, bound.where) for bound in loss_bounds(found, DEFAULT)] == [(False, None), (False, None)]
    (bound,) = loss_bounds(found, DEFAULT.model_copy(update={"max_kld": math.inf}))
    assert not bound.held
