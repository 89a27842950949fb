"""How far apart two models are on the same tokens: KL divergence, top-1 agreement, perplexity.

Logits come in as float32 and are judged in float64. `p` is the reference, `q` the model under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numba
import numpy as np
from numpy.typing import NDArray

from gemexport.formats.grids.lattice import jit
from gemexport.formats.storage.parallel import ordered
from gemexport.formats.tensor import Floats
from gemexport.validators.runtimes.protocol import Logits, TopLogits

# By how many nats p must find q's choice less likely than its own for the two to be told apart by a reader: a tenth.
# Less is a choice that another order of sums or PyTorch's bf16 makes as well (3 % of a small model's tokens).
CHANGED_NATS = 0.1
# KL divergence in nats; by how many nats p finds q's choice less likely than its own; nll_q - nll_p of the next token
# (NaN: unknown).
Row = tuple[float, float, float]


# e^x: n = x / ln 2 rounded, then 2^n times the Taylor series of what is left, which is at most ln 2 / 2. Thirteen terms
# leave 4e-18 of it. ln 2 is in two parts, of which n times the first is exact (Cody and Waite, 1980).
_LN2 = (float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33"))
_ROUNDS = 1.5 * 2.0**52  # added to n, it leaves n in the low bits
_LOWEST = -708.0  # e^x is no normal number below
# Sums in any order: then they may be vectorised. Order is all that is given up: what is not a number stays so.
_sum = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc"})


@jit
def _exp(x: float) -> float:
    """e^x for x <= 0, within 2.3e-16 of it.

    As np.exp, but without the call of a library function that keeps loops from being vectorised.
    """
    x = _LOWEST if x < _LOWEST else x  # and NaN stays NaN
    shifted = x * (1 / np.log(2.0)) + _ROUNDS
    n = shifted - _ROUNDS
    r = (x - n * _LN2[0]) - n * _LN2[1]
    series = 1.0
    for k in range(13, 0, -1):
        series = 1.0 + series * r * (1.0 / k)
    return series * np.int64((np.float64(shifted).view(np.int64) + 1023) << 52).view(np.float64)


@_sum
def _whole(p: Floats, q: Floats, p_top: float, q_top: float) -> tuple[float, float, float]:
    """Of one position: sum(e^p (p - q)) and both sums of e^p and e^q, p and q less their maxima."""
    weighted, p_sum, q_sum = 0.0, 0.0, 0.0
    for i in range(p.size):
        ours, theirs = np.float64(p[i]) - p_top, np.float64(q[i]) - q_top
        share = _exp(ours)
        p_sum += share
        q_sum += _exp(theirs)
        weighted += share * (ours - theirs)
    return weighted, p_sum, q_sum


@_sum
def _total(logits: Floats, top: float) -> float:
    """sum(e^logits) of one position, logits less their maximum."""
    total = 0.0
    for i in range(logits.size):
        total += _exp(np.float64(logits[i]) - top)
    return total


def _full(p: Floats, q: Floats, following: int) -> Row:
    """One position, both distributions whole."""
    q_best = int(q.argmax())
    p_top, q_top = float(p.max()), float(q[q_best])
    weighted, p_sum, q_sum = _whole(p, q, p_top, q_top)
    shift = float(np.log(p_sum / q_sum))
    kld = weighted / p_sum - shift
    excess = float(p[following]) - p_top - (float(q[following]) - q_top) - shift if following >= 0 else np.nan
    return (kld if np.isfinite(kld) else np.nan), p_top - float(p[q_best]), excess


def _top(p: Floats, ids: NDArray[np.int32], logprobs: Floats, following: int) -> Row:
    """One position where q is known for some tokens: those, and one bucket for the rest.

    Merging tokens into a bucket can only lower the divergence, so this is a lower bound of the whole one.
    """
    top = float(p.max())
    kld, best, excess = _buckets(p, top + float(np.log(_total(p, top))), ids, logprobs, following)
    return kld, top - float(p[ids[best]]), excess


@jit
def _buckets(
    p: Floats, p_norm: float, ids: NDArray[np.int32], logprobs: Floats, following: int
) -> tuple[float, int, float]:
    """KL divergence over `ids` and a bucket, which of them q has for the likeliest, and the excess of `following`."""
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
    # Where only q's is not, it is at most that, and what p has there still counts.
    if ids.size < p.size and p_rest > 1e-5:
        kld += p_rest * np.log(p_rest / max(q_rest, 1e-5))
    return kld, best, excess


def _probability(logits: Floats, choice: tuple[int, int]) -> NDArray[np.float64]:
    """`[n]`: the probability of the first of two tokens, of the two."""
    first, second = (np.asarray(logits[:, token], np.float64) for token in choice)
    found: NDArray[np.float64] = 1 / (1 + np.exp(np.clip(second - first, -700, 700)))
    return found


@dataclass
class Divergence:
    """Sums over positions of the divergence of q from p; figures in nats, shares and ratios are properties.

    `tie` is a difference in nats, if there is one, below which rounding decides which of two tokens is the likelier.
    Of a `choice` of two tokens it is noted by how much the first one's probability, of the two, is another.
    """

    tie: float | None = None
    choice: tuple[int, int] | None = None
    positions: int = 0
    kld_sum: float = 0.0
    kld_max: float = 0.0
    agreed: int = 0
    tied: int = 0  # those that agreed, and those whose choices are a tie
    others: int = 0  # those at which q's choice is another in earnest
    predicted: int = 0
    excess_sum: float = 0.0
    rows: list[Row] = field(default_factory=list, repr=False)  # of each position
    moves: list[float] = field(default_factory=list, repr=False)  # of the choice, where q is known for all tokens

    def add(self, p: Floats, q: Logits, tokens: list[int]) -> None:
        """Add a sequence: logits of both models after each of `tokens`, the next token being the prediction's aim."""
        following = [*tokens[1:], -1]

        def one(i: int) -> Row:
            if isinstance(q, TopLogits):
                return _top(p[i], q.ids[i], q.logprobs[i], following[i])
            return _full(p[i], q[i], following[i])

        for row in ordered(one, range(len(tokens))):
            self._count(row)
        if self.choice is not None and not isinstance(q, TopLogits):
            first, second = (_probability(logits, self.choice) for logits in (p, q))
            self.moves += np.abs(second - first).tolist()

    def _count(self, row: Row) -> None:
        kld, gap, excess = row
        self.positions += 1
        self.kld_sum += kld
        self.rows.append(row)
        # A NaN must reach the verdict; max() may drop it.
        self.kld_max = float(np.maximum(self.kld_max, kld))
        self.agreed += gap == 0
        self.tied += gap <= (self.tie or 0)
        self.others += not gap <= CHANGED_NATS
        if not np.isnan(excess):
            self.predicted += 1
            self.excess_sum += excess

    def by_kind(self, kinds: Sequence[tuple[str, int]]) -> dict[str, Divergence]:
        """The same of the positions of each kind, `kinds` being those of the sequences that were added, and lengths."""
        found: dict[str, Divergence] = {}
        start = 0
        for kind, length in kinds:
            part = found.setdefault(kind, Divergence(self.tie))
            for row in self.rows[start : start + length]:
                part._count(row)
            start += length
        return found

    @property
    def choice_mean(self) -> float | None:
        """By how much the probability of the choice is another, on average over positions; None without a choice."""
        return float(np.mean(self.moves)) if self.moves else None

    @property
    def choice_max(self) -> float | None:
        """The same where it is most."""
        return float(np.max(self.moves)) if self.moves else None

    @property
    def kld_mean(self) -> float:
        """Mean KL divergence in nats a position."""
        return self.kld_sum / max(self.positions, 1)

    @property
    def kld_error(self) -> float:
        """Standard error of that mean, in nats: how much it depends on which positions these are."""
        if self.positions < 2:
            return 0.0
        return float(np.std([row[0] for row in self.rows], ddof=1) / np.sqrt(self.positions))

    @property
    def top1_agreement(self) -> float:
        """Share of positions at which both models think the same token likeliest."""
        return self.agreed / max(self.positions, 1)

    @property
    def changed(self) -> float:
        """Share of positions at which p finds q's choice less likely than its own by more than CHANGED_NATS."""
        return self.others / max(self.positions, 1)

    @property
    def top1_but_ties(self) -> float | None:
        """The same share, ties being agreement: p finds q's choice at most `tie` less likely. None without a tie."""
        return None if self.tie is None else self.tied / max(self.positions, 1)

    @property
    def perplexity_ratio(self) -> float:
        """q's perplexity over p's on the positions whose next token q has a probability for."""
        return float(np.exp(self.excess_sum / max(self.predicted, 1)))
