"""What a verdict rests on, as data."""

from __future__ import annotations

import re
from typing import Literal

from gemexport.shared.measured import ReportModel


class Bound(ReportModel):
    """One thing the verdict rests on: a metric, its value, its limit and where that comes from.

    `where` names what broke it: tensors, facts, a text.
    """

    metric: str
    value: float
    relation: Literal["<=", ">="]
    limit: float
    origin: str
    held: bool
    where: str | None = None

    @classmethod
    def at_most(cls, metric: str, value: float, limit: float, origin: str, where: str | None = None) -> Bound:
        """`value` must not exceed `limit`; NaN does not hold."""
        held = value <= limit
        return cls(metric=metric, value=value, relation="<=", limit=limit, origin=origin, held=held, where=where)

    @classmethod
    def at_least(cls, metric: str, value: float, limit: float, origin: str, where: str | None = None) -> Bound:
        """`value` must reach `limit`; NaN does not hold."""
        held = value >= limit
        return cls(metric=metric, value=value, relation=">=", limit=limit, origin=origin, held=held, where=where)

    def __str__(self) -> str:
        broken = "" if self.held else "not "
        text = f"{self.metric} is {self.value:.4g}, {broken}{self.relation} {self.limit:.4g} ({self.origin})"
        text = re.sub(r"e([+-])0?(\d+)\b", lambda found: f"e{found[1].lstrip('+')}{found[2]}", text)
        return text if self.held or not self.where else f"{text}: {self.where}"
