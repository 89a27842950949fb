"""How far apart two models put the same texts: the cosine of their vectors, and how far these are from each other.

Vectors come in as float32 and are judged in float64. `p` is the reference's, `q` that of the model under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.tensor import Floats

Row = tuple[float, float]  # 1 - cosine; the length of q - p over that of p


def compared(p: Floats, q: Floats) -> Row:
    """Two vectors `[size]`; NaN where one is not finite or has no length."""
    ours, theirs = np.asarray(p, np.float64).ravel(), np.asarray(q, np.float64).ravel()
    with np.errstate(all="ignore"):
        size, other = np.linalg.norm(ours), np.linalg.norm(theirs)
        # Half the squared distance of the directions: 1 less the cosine, without what is lost by taking that from 1.
        apart = ours / size - theirs / other
        found = float(apart @ apart / 2), float(np.linalg.norm(theirs - ours) / size)
    return found if np.isfinite(found).all() else (np.nan, np.nan)


@dataclass
class Distance:
    """Sums over texts of how far q's vectors are from p's."""

    texts: int = 0
    distance_sum: float = 0.0
    distance_max: float = 0.0
    error_sum: float = 0.0
    rows: list[Row] = field(default_factory=list, repr=False)  # of each text
    directions: list[NDArray[np.float64]] = field(default_factory=list, repr=False)  # p's, of length 1

    def add(self, p: Floats, q: Floats, tokens: Sequence[int]) -> None:
        """Add a text: its vector `[1, size]` by both models."""
        self._count(compared(p, q))
        ours = np.asarray(p, np.float64).ravel()
        self.directions.append(ours / max(float(np.linalg.norm(ours)), np.finfo(np.float64).tiny))

    def _count(self, row: Row) -> None:
        self.texts += 1
        self.rows.append(row)
        self.distance_sum += row[0]
        self.distance_max = float(np.maximum(self.distance_max, row[0]))  # NaN must reach the verdict
        self.error_sum += row[1]

    def by_kind(self, kinds: Sequence[tuple[str, int]]) -> dict[str, Distance]:
        """The same of the texts of each kind, `kinds` being those of the texts that were added, and lengths."""
        found: dict[str, Distance] = {}
        for (kind, _), row in zip(kinds, self.rows, strict=False):
            found.setdefault(kind, Distance())._count(row)
        return found

    @property
    def distance_mean(self) -> float:
        """Mean of 1 - cosine over the texts."""
        return self.distance_sum / max(self.texts, 1)

    @property
    def spread(self) -> float | None:
        """Mean of 1 - cosine over pairs of p's own vectors: how far apart unrelated texts are; None of one."""
        count = len(self.directions)
        if count < 2:
            return None
        total = np.sum(self.directions, axis=0)
        return 1 - (float(total @ total) - count) / (count * (count - 1))

    @property
    def error_mean(self) -> float:
        """Mean of the relative error over the texts."""
        return self.error_sum / max(self.texts, 1)
