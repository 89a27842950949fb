"""KL divergence, top-1 agreement and perplexity against scipy-free formulas written down once more."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gemexport.formats.tensor import Floats
from gemexport.validators.checks.divergence import Divergence, _exp
from gemexport.validators.runtimes.protocol import TopLogits


def logits(seed: int, positions: int = 6, vocabulary: int = 50) -> Floats:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal((positions, vocabulary)).astype(np.float32) * 3


def log_softmax(values: Floats) -> NDArray[np.float64]:
    wide = values.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def top(values: Floats, k: int) -> TopLogits:
    logprobs = log_softmax(values)
    ids = np.argsort(-logprobs, axis=1)[:, :k]
    return TopLogits(ids.astype(np.int32), np.take_along_axis(logprobs, ids, axis=1).astype(np.float32))


TOKENS = [3, 1, 4, 1, 5, 9]


def test_whole_distributions() -> None:
    p, q = logits(0), logits(1)
    found = Divergence()
    found.add(p, q, TOKENS)
    log_p, log_q = log_softmax(p), log_softmax(q)
    kld = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    following = (range(5), TOKENS[1:])
    assert found.kld_mean == pytest.approx(kld.mean(), rel=1e-12)
    assert found.kld_max == pytest.approx(kld.max(), rel=1e-12)
    assert found.top1_agreement == (p.argmax(1) == q.argmax(1)).mean()
    assert found.perplexity_ratio == pytest.approx(np.exp((log_p[following] - log_q[following]).mean()), rel=1e-12)


def test_the_probability_of_a_choice() -> None:
    """Of two tokens alone, whatever all others have; of no choice nothing is told."""
    p, q = logits(0), logits(1)
    found, none = Divergence(choice=(7, 3)), Divergence()
    for total in (found, none):
        total.add(p, q, TOKENS)
        total.add(q, q, TOKENS)
    ours, theirs = (np.exp(each[:, 7]) / (np.exp(each[:, 7]) + np.exp(each[:, 3])) for each in (p, q))
    assert found.choice_mean == pytest.approx(np.abs(ours - theirs).sum() / 12, rel=1e-5)
    assert found.choice_max == pytest.approx(np.abs(ours - theirs).max(), rel=1e-5)
    assert (none.choice_mean, none.choice_max) == (None, None)
    certain = np.zeros((6, 50), np.float32)
    certain[:, 7] = 3e38
    found.add(certain, -certain, TOKENS)
    assert found.choice_max == 1.0


def test_equal_models_differ_by_nothing() -> None:
    found = Divergence()
    found.add(logits(0), logits(0), TOKENS)
    assert (found.kld_mean, found.top1_agreement, found.perplexity_ratio) == (0.0, 1.0, 1.0)


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    found = Divergence()
    found.add(logits(0), logits(0) + np.float32(8), TOKENS)
    # float32 rounds the sum: 8 + x is good to 2**-20
    assert abs(found.kld_mean) < 1e-11


def test_the_top_is_a_lower_bound_that_meets_the_whole() -> None:
    p, q = logits(0), logits(1)
    whole = Divergence()
    whole.add(p, q, TOKENS)
    before = 0.0
    for k in (1, 10, 30, 49):
        part = Divergence()
        part.add(p, top(q, k), TOKENS)
        assert before <= part.kld_mean <= whole.kld_mean + 1e-6
        assert part.top1_agreement == whole.top1_agreement
        before = part.kld_mean
    everything = Divergence()
    everything.add(p, top(q, 50), TOKENS)
    # log-probabilities were rounded to float32
    assert everything.kld_mean == pytest.approx(whole.kld_mean, rel=1e-6)


def test_what_the_top_leaves_out_counts_where_q_has_nothing_there() -> None:
    """p gives three quarters to six tokens that q thinks impossible: far apart, and never nearer than equal models."""
    p = np.zeros((1, 8), np.float32)
    q = TopLogits(np.array([[0, 1]], np.int32), np.log(np.array([[0.5, 0.5]], np.float32)))
    found = Divergence()
    found.add(p, q, [0])
    assert found.kld_mean > 5


@pytest.mark.parametrize("tops", [False, True])
def test_a_choice_between_tokens_that_are_all_but_as_likely_is_a_tie(tops: bool) -> None:
    """One position agrees, one chooses a token 2e-3 below the likeliest, one a token 0.5 below it."""
    p = np.zeros((3, 50), np.float32)
    p[:, 4], p[:, 9] = 1, (0.25, 0.998, 0.5)
    q = p.copy()
    q[1:, 9] = 2
    for tie, share in ((1e-3, 1 / 3), (1e-2, 2 / 3), (1.0, 1.0)):
        found = Divergence(tie=tie)
        found.add(p, top(q, 10) if tops else q, TOKENS[:3])
        assert found.top1_agreement == 1 / 3
        assert found.top1_but_ties == share
    assert Divergence().top1_but_ties is None


def test_kinds_have_the_positions_of_their_sequences() -> None:
    """A choice that p finds a tenth less likely is another token; a nearer one is not."""
    vocabulary = np.log(np.array([0.4, 0.38, 0.12, 0.1], np.float32))
    p = np.tile(vocabulary, (3, 1))
    near, far = p[:, [1, 0, 2, 3]], p[:, [2, 1, 0, 3]]
    total = Divergence()
    for q in (near, far, near):
        total.add(p, q, [1, 2, 3])
    found = total.by_kind([("code", 3), ("prose", 3), ("code", 3)])
    assert {kind: (part.positions, part.changed) for kind, part in found.items()} == {"code": (6, 0), "prose": (3, 1)}
    assert found["code"].kld_mean == pytest.approx(float(np.sum(np.exp(p[0]) * (p[0] - near[0]))), rel=1e-4)
    assert found["code"].kld_sum + found["prose"].kld_sum == pytest.approx(total.kld_sum)
    assert total.changed == pytest.approx(1 / 3)
    assert total.top1_agreement == 0


def test_nan_reaches_the_figures() -> None:
    damaged = logits(1)
    damaged[2, 7] = np.nan
    found = Divergence()
    found.add(logits(0), damaged, TOKENS)
    assert np.isnan(found.kld_mean)
    assert np.isnan(found.kld_max)


def test_exponentials_are_as_good_as_the_library_s() -> None:
    x = np.concatenate([-np.logspace(-18, np.log10(708), 4000), [0.0, -1e4, -np.inf]])
    found = np.array([_exp(value) for value in x])
    assert np.abs(found[:-2] / np.exp(x[:-2]) - 1).max() <= 2 * np.finfo(np.float64).eps
    assert (found[-2:] < 1e-307).all()
    assert np.isnan(_exp(np.nan))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_logits_are_no_number(value: float) -> None:
    damaged = logits(1)
    damaged[2, 7] = value
    found = Divergence()
    found.add(logits(0), damaged, TOKENS)
    assert not np.isfinite(found.kld_mean)
