"""How far apart two models are on the same tokens: KL divergence, top-1 agreement, perplexity.

Logits come in as float32 and are judged in float64. `p` is the reference, `q` the model under test.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.lattice import jit
from gemexport.formats.parallel import ordered
from gemexport.formats.tensor import Floats
from gemexport.validators.runtime import Logits, TopLogits

Row = tuple[float, bool, float]  # KL divergence in nats, same top-1, nll_q - nll_p of the next token (NaN: unknown)


@jit
def _log_sum_exp(logits: Floats) -> tuple[float, int]:
    """log(sum(exp(logits))) of one row, and where its maximum is."""
    best = 0
    for i in range(logits.size):
        if logits[i] > logits[best]:
            best = i
    top, total = np.float64(logits[best]), 0.0
    for i in range(logits.size):
        total += np.exp(np.float64(logits[i]) - top)
    return top + np.log(total), best


@jit
def _full(p: Floats, q: Floats, following: int) -> Row:
    """One position, both distributions whole."""
    p_norm, p_best = _log_sum_exp(p)
    q_norm, q_best = _log_sum_exp(q)
    kld = 0.0
    for i in range(p.size):
        log_p = p[i] - p_norm
        kld += np.exp(log_p) * (log_p - (q[i] - q_norm))
    excess = np.nan
    if following >= 0:
        excess = (p[following] - p_norm) - (q[following] - q_norm)
    return kld, p_best == q_best, excess


@jit
def _top(p: Floats, ids: NDArray[np.int32], logprobs: Floats, following: int) -> Row:
    """One position where q is known for some tokens: those, and one bucket for the rest.

    Merging tokens into a bucket can only lower the divergence, so this is a lower bound of the whole one.
    """
    p_norm, p_best = _log_sum_exp(p)
    kld, p_seen, q_seen, excess, best = 0.0, 0.0, 0.0, np.nan, 0
    for i in range(ids.size):
        log_p, log_q = p[ids[i]] - p_norm, np.float64(logprobs[i])
        kld += np.exp(log_p) * (log_p - log_q)
        p_seen += np.exp(log_p)
        q_seen += np.exp(log_q)
        if ids[i] == following:
            excess = log_p - log_q
        if logprobs[i] > logprobs[best]:
            best = i
    p_rest, q_rest = 1 - p_seen, 1 - q_seen
    # Log-probabilities come in float32, good to some 1e-6 of the sum: a rest below that is not known, on either side.
    if ids.size < p.size and p_rest > 1e-5 and q_rest > 1e-5:
        kld += p_rest * np.log(p_rest / q_rest)
    return kld, p_best == ids[best], excess


@dataclass
class Divergence:
    """Sums over positions of the divergence of q from p; figures in nats, shares and ratios are properties."""

    positions: int = 0
    kld_sum: float = 0.0
    kld_max: float = 0.0
    agreed: int = 0
    predicted: int = 0
    excess_sum: float = 0.0
    rows: list[float] = field(default_factory=list, repr=False)  # KL divergence of each position

    def add(self, p: Floats, q: Logits, tokens: list[int]) -> None:
        """Add a sequence: logits of both models after each of `tokens`, the next token being the prediction's aim."""
        following = [*tokens[1:], -1]

        def one(i: int) -> Row:
            if isinstance(q, TopLogits):
                return _top(p[i], q.ids[i], q.logprobs[i], following[i])
            return _full(p[i], q[i], following[i])

        for kld, same, excess in ordered(one, range(len(tokens))):
            self.positions += 1
            self.kld_sum += kld
            self.rows.append(kld)
            # A NaN must reach the verdict; max() may drop it.
            self.kld_max = float(np.maximum(self.kld_max, kld))
            self.agreed += same
            if not np.isnan(excess):
                self.predicted += 1
                self.excess_sum += excess

    @property
    def kld_mean(self) -> float:
        """Mean KL divergence in nats a position."""
        return self.kld_sum / max(self.positions, 1)

    @property
    def top1_agreement(self) -> float:
        """Share of positions at which both models think the same token likeliest."""
        return self.agreed / max(self.positions, 1)

    @property
    def perplexity_ratio(self) -> float:
        """q's perplexity over p's on the positions whose next token q has a probability for."""
        return float(np.exp(self.excess_sum / max(self.predicted, 1)))
