"""Which width each matrix gets where a size or a loss is given: the choice, out of what widths cost and what they lose.

A unit is matrices that share a width, because programs multiply them as one (q, k and v; gate and up), or a table by
itself. Losses of units add up, near enough, and so do their bytes: the best choice takes the steps on each unit's
convex hull in the order of what they gain a byte. Tables are so large that a step of one may not fit where many small
ones do: the choice is made for each of their widths, and the best is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Literal

from pydantic import BaseModel, ConfigDict

from gemexport.formats.grids.recipe import WIDTHS, Scheme

# What a unit may become, by order; the place after the last stands for staying as it is.
OPTIONS = (*(Scheme(bits=bits) for bits in WIDTHS), Scheme(bits=3, group_size=64), Scheme(bits=4, group_size=64))
PLAIN = len(OPTIONS)
LINEARS = "linears"  # the class of all units that are no table


class Goal(BaseModel):
    """What widths are chosen for: one of the three."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["size", "bits", "max_kld"]
    most: float  # bytes of an artefact; mean bits of a code; nats


class Unit(BaseModel):
    """Matrices that share a width, and the nats a position that each of OPTIONS costs."""

    model_config = ConfigDict(frozen=True)

    names: tuple[str, ...]
    weights: int
    table: bool
    lost: tuple[float | None, ...]  # None: its rows do not divide into these groups

    @property
    def group(self) -> str:
        """The class whose bytes a weight it has."""
        return self.names[0] if self.table else LINEARS

    def loss(self, option: int) -> float:
        """Nats a position; none for staying as it is, and no end for what there is not."""
        nats = 0.0 if option == PLAIN else self.lost[option]
        return math.inf if nats is None else nats


@dataclass(frozen=True)
class Price:
    """What an artefact takes: `fixed`, and for each weight of a unit by its class and option, in bytes.

    With codes alone to count, the same in bits.
    """

    fixed: float
    weight: Mapping[str, Sequence[float]]

    def of(self, unit: Unit, option: int) -> float:
        """What a unit takes."""
        return unit.weights * self.weight[unit.group][option]


@dataclass(frozen=True)
class Choice:
    """An option for every unit, and the loss that is to be expected."""

    options: tuple[int, ...]
    loss: float

    def schemes(self, units: Sequence[Unit]) -> dict[str, Scheme | None]:
        """By matrix; None: it stays as it is."""
        return {
            name: None if option == PLAIN else OPTIONS[option]
            for unit, option in zip(units, self.options, strict=True)
            for name in unit.names
        }


def choose(
    units: Sequence[Unit],
    widths: Sequence[int],
    prices: Sequence[Price],
    limits: Sequence[float] | None = None,
    loss: float = 0.0,
) -> Choice | None:
    """The choice that loses least where no artefact takes more than its limit, or else is smallest within `loss` nats.

    `widths` are the bits that there may be, beside what stays as it is; None where even the smallest choice is too
    large. The same units give the same choice.
    """
    allowed = [number for number, scheme in enumerate(OPTIONS) if scheme.bits in widths] + [PLAIN]
    found: list[tuple[float, float, Choice]] = []
    tables = [number for number, unit in enumerate(units) if unit.table]
    for fixed in product(*(_possible(units[number], allowed) for number in tables)):
        given = dict(zip(tables, fixed, strict=True))
        start = {n: [given[n]] if n in given else _hull(unit, allowed, prices) for n, unit in enumerate(units)}
        choice = _within(units, start, prices, limits) if limits else _reaching(units, start, prices, loss)
        if choice is not None:
            taken = sum(_taken(unit, option, prices) for unit, option in zip(units, choice.options, strict=True))
            found.append((choice.loss, taken, choice) if limits else (taken, choice.loss, choice))
    return min(found, key=lambda item: item[:2])[2] if found else None


def _hull(unit: Unit, allowed: Sequence[int], prices: Sequence[Price]) -> list[int]:
    """The options that are best at some price of a byte, the smallest first."""
    points = sorted((_taken(unit, option, prices), unit.loss(option), option) for option in _possible(unit, allowed))
    hull: list[tuple[float, float, int]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        if hull and point[0] == hull[-1][0]:
            hull.pop()
        hull.append(point)
    return [option for _, _, option in hull]


def _possible(unit: Unit, allowed: Sequence[int]) -> list[int]:
    return [option for option in allowed if math.isfinite(unit.loss(option))]


def _slope(first: tuple[float, float, int], second: tuple[float, float, int]) -> float:
    """Nats that a byte more saves between two points."""
    return (first[1] - second[1]) / max(second[0] - first[0], 1e-9)


def _taken(unit: Unit, option: int, prices: Sequence[Price]) -> float:
    return sum(price.of(unit, option) for price in prices)


@dataclass(frozen=True)
class _Step:
    """One unit's way from an option to the next on its hull."""

    gain: float  # nats a byte
    unit: int
    option: int
    order: int


def _steps(units: Sequence[Unit], hulls: Mapping[int, list[int]], prices: Sequence[Price]) -> Iterator[_Step]:
    """All steps, those that gain most first; of each unit they come in order, because its hull is convex."""
    steps = []
    for number, options in hulls.items():
        for order, (before, after) in enumerate(pairwise(options)):
            unit = units[number]
            more = _taken(unit, after, prices) - _taken(unit, before, prices)
            steps.append(_Step((unit.loss(before) - unit.loss(after)) / more, number, after, order))
    yield from sorted(steps, key=lambda step: (-step.gain, step.unit, step.order))


def _within(
    units: Sequence[Unit], hulls: Mapping[int, list[int]], prices: Sequence[Price], limits: Sequence[float]
) -> Choice | None:
    """Steps as long as nothing is too large; a unit whose step does not fit stays where it is."""
    options = [hulls[number][0] for number in range(len(units))]
    room = [
        limit - price.fixed - sum(price.of(unit, option) for unit, option in zip(units, options, strict=True))
        for price, limit in zip(prices, limits, strict=True)
    ]
    if min(room) < 0:
        return None
    stopped = set()
    for step in _steps(units, hulls, prices):
        unit, before = units[step.unit], options[step.unit]
        more = [price.of(unit, step.option) - price.of(unit, before) for price in prices]
        if step.unit in stopped or any(taken > left for taken, left in zip(more, room, strict=True)):
            stopped.add(step.unit)
            continue
        options[step.unit] = step.option
        room = [left - taken for taken, left in zip(more, room, strict=True)]
    return Choice(tuple(options), _loss(units, options))


def _reaching(
    units: Sequence[Unit], hulls: Mapping[int, list[int]], prices: Sequence[Price], loss: float
) -> Choice | None:
    """Steps until the loss is within what it may be."""
    options = [hulls[number][0] for number in range(len(units))]
    for step in _steps(units, hulls, prices):
        if _loss(units, options) <= loss:
            break
        options[step.unit] = step.option
    found = _loss(units, options)
    return Choice(tuple(options), found) if found <= loss else None


def _loss(units: Sequence[Unit], options: Sequence[int]) -> float:
    return sum(unit.loss(option) for unit, option in zip(units, options, strict=True))
