"""Where things lie in the report's pictures; templates/charts.html draws them.

Positions are computed here and drawn by the page's own templates, because a plotting library fixes letters and colours
in the picture: scaled to a phone its text cannot be read, and it does not follow the page into the dark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from gemexport.report import ArtifactReport, Report, TensorReport

LETTER = 7.1  # pixels that a letter of 12 takes: DejaVu Sans, the widest of the usual fonts, half of it bold
LINE = 15.0  # height of a line of them
RADIUS = 5.0
LAYER = re.compile(r"^(?:.*\.)?layers\.(\d+)\.(.+)$")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Where a name may stand, tried in turn: beside its point, then further away with a line that leads there.
_DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
_DISTANCES = (0, 8, 18, 30, 44, 60, 80)

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: pixels from its start, and what is written there."""

    at: float
    text: str


@dataclass(frozen=True)
class Label:
    """A name: where it is anchored, its base line, and where a line leads to it if it stands away from its point.

    Fonts differ in width, so a name is anchored at the end that is next to its point.
    """

    x: float
    y: float
    anchor: str  # start, middle or end, as SVG's text-anchor has it
    leader: tuple[float, float] | None


@dataclass(frozen=True)
class Point:
    """An artefact in the plot; `label` is None where its name would lie on another."""

    artifact: ArtifactReport
    x: float
    y: float
    label: Label | None


@dataclass(frozen=True)
class OperatingPoints:
    """Loss against bytes, `width` by `height` pixels; the frame within is left, top, right, bottom."""

    width: int
    height: int
    frame: Box
    xs: tuple[Tick, ...]
    ys: tuple[Tick, ...]
    floor: Tick | None
    points: tuple[Point, ...]
    front: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Logarithmic:
    """A logarithmic axis over whole decades, from `top` down to `bottom`, with a place for zero below them."""

    low: int
    high: int
    zero: bool
    top: float
    bottom: float

    @classmethod
    def over(cls, values: Sequence[float], top: float, bottom: float) -> Logarithmic:
        """The axis that `values` need: their decades, two at least and twelve at most, and zero where one is."""
        finite = [value for value in values if 0 < value < math.inf]
        high = max((math.ceil(math.log10(value)) for value in finite), default=0)
        low = min((math.floor(math.log10(value)) for value in finite), default=high - 2)
        low = max(min(low, high - 2), high - 12)
        return cls(low, high, any(value < 10.0**low for value in values), top, bottom)

    @cached_property
    def _end(self) -> float:
        """Where the lowest decade is: zero has an eighth of the height to itself."""
        return self.bottom - (self.bottom - self.top) / 8 if self.zero else self.bottom

    def at(self, value: float) -> float:
        """Pixels of a value; what is smaller than the lowest decade counts as zero."""
        if value < 10.0**self.low:
            return self.bottom
        exponent = math.log10(value) if value < math.inf else self.high
        share = min(1.0, (exponent - self.low) / (self.high - self.low))
        return round(self._end - share * (self._end - self.top), 1)

    def ticks(self) -> tuple[Tick, ...]:
        """The decades, every second or third one where they are many, and zero."""
        step = 1 + (self.high - self.low) // 6
        decades = [Tick(self.at(10.0**n), power(n)) for n in range(self.high, self.low - 1, -step)]
        return (*decades, *([Tick(self.bottom, "0")] if self.zero else []))


def power(exponent: int) -> str:
    """A power of ten as it is written: `10⁻⁵`, `1`."""
    return "1" if exponent == 0 else f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def operating_points(report: Report, width: int, height: int, per_tick: int = 90) -> OperatingPoints | None:
    """The artefacts whose loss was measured, by size and loss; None when there is none."""
    shown = [(item, size, kld) for item, size, kld in _measured(report)]
    if not shown:
        return None
    frame = (42.0, 10.0, width - 8.0, height - 26.0)
    floor = _noise_floor(report)
    losses = [kld for _, _, kld in shown]
    axis = Logarithmic.over([*losses, *([floor] if floor else [])], frame[1] + 8, frame[3] - 8)
    xs, left, right = _sizes([size for _, size, _ in shown], max(2, int((frame[2] - frame[0]) // per_tick)))

    def across(size: float) -> float:
        inset = 14.0
        return round(frame[0] + inset + (size - left) / (right - left) * (frame[2] - frame[0] - 2 * inset), 1)

    places = [(across(size), axis.at(kld)) for _, size, kld in shown]
    noise = Tick(axis.at(floor), "bf16 noise") if floor else None
    names = [f"{item.format} {item.variant}" for item, _, _ in shown]
    sound = [(size, kld, place) for (item, size, kld), place in zip(shown, places, strict=True) if _sound(item)]
    front = _front(sound, frame)
    labels = _labels(names, places, frame, noise, front)
    return OperatingPoints(
        width,
        height,
        frame,
        tuple(Tick(across(size), text) for size, text in xs),
        axis.ticks(),
        noise,
        tuple(Point(item, *at, label) for (item, _, _), at, label in zip(shown, places, labels, strict=True)),
        front,
    )


def _measured(report: Report) -> list[tuple[ArtifactReport, int, float]]:
    found = []
    for item in report.artifacts:
        loss = item.logits.loss.kld_mean if item.logits and item.logits.loss else math.nan
        if item.bytes is not None and not math.isnan(loss):
            found.append((item, item.bytes, loss))
    return found


def _noise_floor(report: Report) -> float | None:
    floors = (item.logits.noise_floor for item in report.artifacts if item.logits and item.logits.noise_floor)
    return next((floor.kld_mean for floor in floors if 0 < floor.kld_mean < math.inf), None)


def _sizes(sizes: Sequence[int], most: int) -> tuple[list[tuple[float, str]], float, float]:
    """At most `most` + 1 round sizes with their texts, and the ends of an axis that holds them and all of `sizes`."""
    low, high = float(min(sizes)), float(max(sizes))
    if high - low < 0.1 * high:
        low, high = low - 0.05 * high, high + 0.05 * high
    least = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(least))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= least)
    first, last = math.ceil(low / step), math.floor(high / step)
    unit, name = max(pair for pair in ((1e0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB")) if pair[0] <= high)
    ticks = [(n * step, f"{n * step / unit:g} {name}") for n in range(first, last + 1)]
    return ticks, low, high


def _labels(
    names: Sequence[str],
    places: Sequence[tuple[float, float]],
    frame: Box,
    noise: Tick | None,
    front: Sequence[tuple[float, float]],
) -> list[Label | None]:
    """A place for each name where it hides nothing; those that have neighbours nearest choose first.

    A name lies on a line only where there is no other place for it, and on another name never.
    """
    taken = [(x - RADIUS - 1, y - RADIUS - 1, x + RADIUS + 1, y + RADIUS + 1) for x, y in places]
    if noise is not None:
        taken.append((frame[2] - LETTER * len(noise.text) - 6, noise.at - LINE - 2, frame[2], noise.at + 2))
    lines = [(min(a, c), min(b, d) - 1, max(a, c), max(b, d) + 1) for (a, b), (c, d) in pairwise(front)]
    if noise is not None:
        lines.append((frame[0], noise.at - 1, frame[2], noise.at + 1))
    found: list[Label | None] = [None] * len(names)
    for i in sorted(range(len(names)), key=lambda i: (_room(places, i), i)):
        free = [
            (box, leader)
            for box, leader in _candidates(names[i], *places[i])
            if _inside(box, frame) and not any(_overlap(box, other) for other in taken)
        ]
        clear = [pair for pair in free if not any(_overlap(pair[0], line) for line in lines)]
        if free:
            box, leader = (clear or free)[0]
            taken.append(box)
            found[i] = _anchored(box, places[i][0], leader)
    return found


def _anchored(box: Box, x: float, leader: tuple[float, float] | None) -> Label:
    left, right = box[0] + 2, box[2] - 2
    anchor, at = ("start", left) if left > x else ("end", right) if right < x else ("middle", (left + right) / 2)
    return Label(round(at, 1), round(box[3] - 4, 1), anchor, leader)


def _room(places: Sequence[tuple[float, float]], i: int) -> float:
    others = (math.dist(places[i], place) for j, place in enumerate(places) if j != i)
    return min(others, default=math.inf)


def _candidates(name: str, x: float, y: float) -> Iterable[tuple[Box, tuple[float, float] | None]]:
    """Boxes for a name around its point, nearest first, with where a line from the point would end."""
    width = LETTER * len(name) + 4
    for distance in _DISTANCES:
        for across, down in _DIRECTIONS:
            reach = RADIUS + 2 + distance
            middle = (x + across * (reach + width / 2), y + down * (reach + LINE / 2) * (0.7 if across else 1.0))
            box = (middle[0] - width / 2, middle[1] - LINE / 2, middle[0] + width / 2, middle[1] + LINE / 2)
            nearest = (min(max(x, box[0] + 2), box[2] - 2), min(max(y, box[1]), box[3]))
            yield tuple(round(edge, 1) for edge in box), (nearest if distance else None)  # type: ignore[misc]


def _inside(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _sound(artifact: ArtifactReport) -> bool:
    """Whether one may choose it."""
    return artifact.status in ("pass", "skipped")


def _front(found: Sequence[tuple[int, float, tuple[float, float]]], frame: Box) -> tuple[tuple[float, float], ...]:
    """Corners of the stairs under which there is nothing: an artefact on them loses least of all that are as small.

    `found` are sizes, losses and places.
    """
    corners: list[tuple[float, float]] = []
    least = math.inf
    for _, loss, (x, y) in sorted(found):
        if loss < least:
            corners += [(x, corners[-1][1] if corners else frame[1]), (x, y)]
            least = loss
    return (*corners, (frame[2], corners[-1][1])) if corners else ()


@dataclass(frozen=True)
class Column:
    """One layer of the error plot: what it is called, its worst tensor, and how many there are."""

    name: str
    worst: TensorReport
    error: float
    count: int


@dataclass(frozen=True)
class LayerErrors:
    """Errors by layer in a picture of 100 by 100: points by kind of tensor, and the ticks of both axes."""

    groups: tuple[tuple[str, str], ...]  # kind, and its points as a path of zero-length strokes
    worst: str  # the line through each layer's largest
    xs: tuple[Tick, ...]
    ys: tuple[Tick, ...]
    columns: tuple[Column, ...]


def layer_errors(tensors: Iterable[TensorReport]) -> LayerErrors | None:
    """The root-mean-square error of each matrix by layer, what is in no layer first; None where all are zero."""
    errors = [(item, item.rms_relative_error) for item in tensors]
    shown = [(item, error) for item, error in errors if error is not None and (len(item.shape) == 2 or error)]
    shown = [(item, error) for item, error in shown if not math.isnan(error)]
    if not any(error for _, error in shown):
        return None
    axis = Logarithmic.over([error for _, error in shown], 4, 96)
    found: dict[int, list[tuple[TensorReport, float]]] = {}
    for item, error in shown:
        found.setdefault(layer(item.name), []).append((item, error))
    columns = {at: _column(at, found[at]) for at in sorted(found)}
    width = 100 / len(columns)
    across = {at: round((i + 0.5) * width, 2) for i, at in enumerate(columns)}
    groups: dict[str, str] = {"attention": "", "MLP": "", "other": ""}
    # Side by side in their layer's column: equal errors would hide each other.
    beside = dict(zip(groups, (-width / 5, 0.0, width / 5), strict=True))
    for item, error in shown:
        group = _group(item.name)
        groups[group] += f"M{across[layer(item.name)] + beside[group]:.4g} {axis.at(error):g}h0"
    line = [f"{across[at]:g} {axis.at(column.error):g}" for at, column in columns.items() if at >= 0]
    step = 5 if len(columns) <= 40 else 10
    return LayerErrors(
        tuple((kind, path) for kind, path in groups.items() if path),
        "M" + "L".join(line) if len(line) > 1 else "",
        tuple(Tick(across[at], str(at)) for at in columns if at >= 0 and at % step == 0),
        axis.ticks(),
        tuple(columns.values()),
    )


def _column(at: int, found: Sequence[tuple[TensorReport, float]]) -> Column:
    worst, error = max(found, key=lambda pair: pair[1])
    return Column(f"layer {at}" if at >= 0 else "outside the layers", worst, error, len(found))


def layer(name: str) -> int:
    """The layer that a tensor belongs to by its name; -1 for none."""
    found = LAYER.match(name)
    return int(found[1]) if found else -1


def _group(name: str) -> str:
    if ".self_attn." in name:
        return "attention"
    return "MLP" if ".mlp." in name else "other"
