"""What the report's pictures show; gemexport/report/plots.py draws them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from gemexport.formats.gemma.names import role_of
from gemexport.report.schema import ArtifactReport, Report
from gemexport.shared.measured import TensorReport

LAYER = re.compile(r"^(?:.*\.)?layers\.(\d+)\.(.+)$")
OUTSIDE = -1  # the place of what is in no layer


@dataclass(frozen=True)
class Point:
    """An artefact in the plot of loss against size: bytes, and nats of its mean KL divergence (infinite at worst)."""

    artifact: ArtifactReport
    bytes: int
    loss: float

    @property
    def sound(self) -> bool:
        """Whether one may choose it."""
        return self.artifact.status == "pass"


@dataclass(frozen=True)
class OperatingPoints:
    """The artefacts by bytes and loss; `floor` is the loss of PyTorch's own bf16, where it was measured."""

    points: tuple[Point, ...]
    floor: float | None

    @property
    def front(self) -> tuple[Point, ...]:
        """Those that lose least of all sound ones that are as small, the smallest first."""
        corners: list[Point] = []
        for point in sorted(self.points, key=lambda point: (point.bytes, point.loss)):
            if point.sound and (not corners or point.loss < corners[-1].loss):
                corners.append(point)
        return tuple(corners)


def operating_points(report: Report) -> OperatingPoints | None:
    """The artefacts whose loss was measured; None when there is none."""
    found = []
    for item in report.artifacts:
        loss = item.logits.loss.kld_mean if item.logits and item.logits.loss else math.nan
        if item.bytes is not None and not math.isnan(loss):
            found.append(Point(item, item.bytes, loss))
    floors = (item.logits.noise_floor for item in report.artifacts if item.logits and item.logits.noise_floor)
    floor = next((floor.kld_mean for floor in floors if 0 < floor.kld_mean < math.inf), None)
    return OperatingPoints(tuple(found), floor) if found else None


@dataclass(frozen=True)
class Column:
    """One layer of the error plot (OUTSIDE: what is in none): its worst tensor, its error, and how many there are."""

    layer: int
    worst: TensorReport
    error: float
    count: int

    @property
    def name(self) -> str:
        return f"layer {self.layer}" if self.layer != OUTSIDE else "outside the layers"


@dataclass(frozen=True)
class LayerErrors:
    """Root-mean-square errors by kind of tensor, each with its layer, and the columns that they stand in."""

    groups: dict[str, tuple[tuple[int, float], ...]]
    columns: tuple[Column, ...]


def layer_errors(tensors: Iterable[TensorReport]) -> LayerErrors | None:
    """The root-mean-square error of each matrix by layer, what is in no layer first; None where all are zero."""
    errors = [(item, item.rms_relative_error) for item in tensors]
    shown = [(item, error) for item, error in errors if error is not None and (len(item.shape) >= 2 or error)]
    shown = [(item, error) for item, error in shown if not math.isnan(error)]
    if not any(error for _, error in shown):
        return None
    columns: dict[int, list[tuple[TensorReport, float]]] = {}
    groups: dict[str, list[tuple[int, float]]] = {"attention": [], "MLP": [], "other": []}
    for item, error in shown:
        at = layer(item.name)
        columns.setdefault(at, []).append((item, error))
        groups[_group(item.name)].append((at, error))
    return LayerErrors(
        {kind: tuple(found) for kind, found in groups.items() if found},
        tuple(_column(at, columns[at]) for at in sorted(columns)),
    )


def _column(at: int, found: list[tuple[TensorReport, float]]) -> Column:
    worst, error = max(found, key=lambda pair: pair[1])
    return Column(at, worst, error, len(found))


def layer(name: str) -> int:
    """The layer that a tensor belongs to by its name; OUTSIDE for none."""
    found = LAYER.match(name)
    return int(found[1]) if found else OUTSIDE


def _group(name: str) -> str:
    role = role_of(name)
    return "other" if role is None else role.block
