"""The report's two pictures, drawn by matplotlib as SVG in the page's colours and letters.

Each is drawn twice, for a desk and for a phone; the page shows one of them. What is in them is in charts.py.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
import textalloc
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.cbook import pts_to_poststep
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator
from numpy.typing import NDArray

from gemexport.report import svg
from gemexport.report.charts import OUTSIDE, Column, LayerErrors, OperatingPoints, Point
from gemexport.report.svg import COLORS

Places = NDArray[np.float64]  # [points, 2] in the units of the axes

SIZES = {"wide": (720, 340), "narrow": (358, 330)}  # of the plot of loss against size, in pixels of the page
LAYER_SIZES = {"wide": (720, 230), "narrow": (330, 230)}
_MARGINS = (44, 26, 8, 10)  # pixels left of the frame, below, right and above
_DOT, _HIT = 10.0, 28.0  # diameters; a finger needs the second
_STYLE = {
    "svg.fonttype": "none", "path.simplify": False, "figure.dpi": 72, "figure.facecolor": "none",
    "axes.facecolor": "none", "axes.grid": True, "axes.axisbelow": True, "axes.spines.left": False,
    "axes.spines.right": False, "axes.spines.top": False, "axes.spines.bottom": False,
    "grid.color": COLORS["rule"], "grid.linewidth": 1, "font.size": 12, "text.color": COLORS["ink"],
    "text.parse_math": False, "xtick.labelsize": 12, "ytick.labelsize": 12, "xtick.labelcolor": COLORS["quiet"],
    "ytick.labelcolor": COLORS["quiet"], "xtick.color": COLORS["rule"], "ytick.color": COLORS["rule"],
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "xtick.major.pad": 7, "ytick.major.pad": 7,
}  # fmt: skip
_DIRECTIONS = ["east", "west", "north", "south", "northeast", "northwest", "southeast", "southwest"]
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MARKS = {"pass": ("o", _DOT, "pass"), "partial": ("D", 0.9 * _DOT, "skip")}
_FAILED = ("D", 0.9 * _DOT, "fail")


def draw_points(chart: OperatingPoints, kind: str, titles: Sequence[str], targets: Sequence[str]) -> str:
    """Loss against size for a `kind` of SIZES; each point has its title and leads to its target, an id of the page."""
    with _page_style(f"points {kind}"):
        figure, axes = _figure(SIZES[kind])
        _losses(axes, chart)
        _sizes(axes.xaxis, chart, 8 if kind == "wide" else 4)
        _lines(axes, chart)
        for i, point in enumerate(chart.points):
            _mark(axes, point, i)
        _name_points(axes, chart)
        root = svg.elements(_unclipped(figure))
    svg.describe(root, "Loss against size", " ".join(f"{title}." for title in titles), f"points-{kind}")
    root.attrib = {"class": f"points {kind}", "role": "group", **root.attrib}
    for i, (point, title, target) in enumerate(zip(chart.points, titles, targets, strict=True)):
        link = Element("a", {"href": f"#{target}", "class": f"tip {point.artifact.status}"})
        parts = {part: svg.take(root, f"{part}-{i}") for part in ("hit", "dot", "name")}
        for part, element in parts.items():
            if element is not None:
                link.append(svg.styled_by_page(element, "hit") if part == "hit" else element)
        for text in link.iter("text"):
            svg.embolden(text, (point.artifact.format, point.artifact.variant))
        root.append(svg.titled(link, title))
    return svg.written(root)


def draw_layers(chart: LayerErrors, kind: str, titles: Sequence[str], name: str) -> str:
    """Errors by layer for a `kind` of LAYER_SIZES; each column has its title. `name` sets it apart in the page."""
    with _page_style(f"layers {name} {kind}"):
        figure, axes = _figure(LAYER_SIZES[kind])
        _logarithmic(axes.yaxis, [error for found in chart.groups.values() for _, error in found], 6)
        _layers(axes, chart.columns)
        # Side by side in their layer's column: equal errors would hide each other.
        for group, shift in (("attention", -0.2), ("MLP", 0.0), ("other", 0.2)):
            found = chart.groups.get(group, ())
            color = COLORS[group.lower()]
            xs, ys = [at + shift for at, _ in found], [_finite(error, axes) for _, error in found]
            axes.plot(xs, ys, "o", markersize=5, color=color, markeredgewidth=0, alpha=0.85, gid=f"dots-{group}")
        for column in chart.columns:
            axes.axvspan(column.layer - 0.5, column.layer + 0.5, color=COLORS["ink"], gid=f"hit-{column.layer}")
        root = svg.elements(_unclipped(figure))
    description = " ".join(f"{title}." for title in titles)
    svg.describe(root, "Error of each matrix by layer", description, f"layers-{name}-{kind}")
    root.attrib = {"class": kind, "role": "img", **root.attrib}
    for column, title in zip(chart.columns, titles, strict=True):
        hit = svg.take(root, f"hit-{column.layer}")
        if hit is not None:
            root.append(svg.titled(svg.styled_by_page(hit, "tip hit"), title))
    return svg.written(root)


@contextlib.contextmanager
def _page_style(salt: str) -> Iterator[None]:
    """matplotlib's defaults and the page's style, whatever the user's own are; `salt` makes ids that no other has."""
    with style.context(["default", {**_STYLE, "svg.hashsalt": salt}]):
        yield


def _figure(size: tuple[int, int]) -> tuple[Figure, Axes]:
    width, height = size
    left, below, right, above = _MARGINS
    figure = Figure(figsize=(width / 72, height / 72))
    frame = (left / width, below / height, 1 - (left + right) / width, 1 - (below + above) / height)
    return figure, figure.add_axes(frame)


def _unclipped(figure: Figure) -> Figure:
    """Limits hold everything; clip paths would only take bytes, and cut marks that stand on an edge."""
    for artist in figure.findobj():
        artist.set_clip_on(False)
    return figure


def power(value: float) -> str:
    """A power of ten as it is written: `10⁻⁵`, `1`, and `0` for none."""
    if value <= 0:
        return "0" if value == 0 else ""
    exponent = round(math.log10(value))
    return "1" if exponent == 0 else f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def _logarithmic(axis: YAxis, values: Sequence[float], ticks: int) -> None:
    """Whole decades, two at least and twelve at most, and a place for zero below them where something is smaller."""
    finite = [value for value in values if 0 < value < math.inf]
    high = max((math.ceil(math.log10(value)) for value in finite), default=0)
    low = max(min((math.floor(math.log10(value)) for value in finite), default=0), high - 12)
    low = min(low, high - 2)
    least, most = 10.0**low, 10.0**high
    if any(value < least for value in values):
        decades = (high - low) / 6
        axis.axes.set_yscale("symlog", linthresh=least, linscale=decades)
        locator = SymmetricalLogLocator(base=10, linthresh=least)
        locator.set_params(numticks=ticks)
        axis.set_major_locator(locator)
        axis.axes.set_ylim(-least / 5, most)
    else:
        axis.axes.set_yscale("log")
        axis.set_major_locator(LogLocator(numticks=ticks))
        axis.axes.set_ylim(least / 10 ** ((high - low) / 20), most)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))


def _losses(axes: Axes, chart: OperatingPoints) -> None:
    _logarithmic(axes.yaxis, [*(point.loss for point in chart.points), *([chart.floor] if chart.floor else [])], 7)


def _sizes(axis: XAxis, chart: OperatingPoints, most: int) -> None:
    """Round numbers of bytes, and margins that hold the smallest and the largest artefact's marks."""
    low, high = min(point.bytes for point in chart.points), max(point.bytes for point in chart.points)
    margin = max(0.03 * (high - low), 0.02 * high)
    axis.axes.set_xlim(low - margin, high + margin)
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(EngFormatter(unit="B"))


def _finite(value: float, axes: Axes) -> float:
    """`value`, or the upper end of the axis for what is beyond it."""
    return float(min(value, axes.get_ylim()[1]))


def _lines(axes: Axes, chart: OperatingPoints) -> None:
    """The level of bf16's own noise, and the stairs under which there is nothing."""
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    if chart.floor:
        level = ([axes.get_xlim()[0], right], [chart.floor] * 2)
        axes.plot(*level, color=COLORS["quiet"], linewidth=1, dashes=(2, 2), gid="line")
        axes.annotate("bf16 noise", (right, chart.floor), (-4, 4), textcoords="offset pixels", ha="right",
                      color=COLORS["quiet"])  # fmt: skip
    if chart.front:
        xs = [float(point.bytes) for point in chart.front]
        ys = [_finite(point.loss, axes) for point in chart.front]
        stairs = pts_to_poststep([xs[0], *xs, right], [top, *ys, ys[-1]])
        axes.plot(*stairs, color=COLORS["pass"], alpha=0.45, linewidth=1.5, gid="line")


def _mark(axes: Axes, point: Point, i: int) -> None:
    marker, size, color = _MARKS.get(point.artifact.status, _FAILED)
    at = ([point.bytes], [_finite(point.loss, axes)])
    axes.plot(*at, "o", markersize=_HIT, color=COLORS["ink"], gid=f"hit-{i}")
    axes.plot(*at, marker, markersize=size, color=COLORS[color], markeredgecolor=COLORS["paper"],
              markeredgewidth=1.5, gid=f"dot-{i}")  # fmt: skip


def _name_points(axes: Axes, chart: OperatingPoints) -> None:
    """Write each artefact's name near its point, where it hides nothing.

    A name lies on a line of the plot only where there is no other place for it, on another name or a point never: one
    that finds no place is left to the point's title.
    """
    lines = [np.asarray(line.get_xydata(), np.float64) for line in axes.get_lines() if line.get_gid() == "line"]
    taken = [_outline(axes, text) for text in axes.texts]
    left = list(range(len(chart.points)))
    for obstacles in (lines, []):
        placed = _placed(axes, chart, left, [*obstacles, *taken])
        taken += [_outline(axes, text) for text in placed.values()]
        left = [i for i in left if i not in placed]


def _placed(axes: Axes, chart: OperatingPoints, which: Sequence[int], obstacles: Sequence[Places]) -> dict[int, Text]:
    """The names of these points that found a place, by their point; a line leads to a name that stands away."""
    if not which:
        return {}
    xs = np.array([point.bytes for point in chart.points], np.float64)
    ys = np.array([_finite(point.loss, axes) for point in chart.points], np.float64)
    names = [f"{chart.points[i].artifact.format} {chart.points[i].artifact.variant}" for i in which]
    sizes: Any = np.full(len(xs), _DOT / 2 + 1)
    pixel = 1 / axes.bbox.width
    with contextlib.redirect_stdout(io.StringIO()):  # textalloc prints when nothing has found a place
        allocated: Any = textalloc.allocate(
            axes, xs[list(which)], ys[list(which)], names, x_scatter=xs, y_scatter=ys,
            scatter_sizes=sizes, x_lines=[line[:, 0] for line in obstacles],
            y_lines=[line[:, 1] for line in obstacles], textsize=12, fontweight="bold", textcolor=COLORS["ink"],
            margin=pixel, min_distance=8 * pixel, max_distance=90 * pixel, draw_all=False, linecolor=COLORS["quiet"],
            plot_kwargs={"alpha": 0.55}, avoid_label_lines_overlap=True, direction=_DIRECTIONS, va="bottom",
        )  # fmt: skip
    _, _, texts, leaders = allocated
    for leader in leaders:
        if leader is not None and np.hypot(*np.ptp(axes.transData.transform(leader.get_xydata()), axis=0)) < _HIT / 2:
            leader.remove()
    placed = {i: text for i, text in zip(which, texts, strict=True) if text is not None}
    for i, text in placed.items():
        text.set_gid(f"name-{i}")
    return placed


def _outline(axes: Axes, text: Text) -> Places:
    """The box that a text covers, as a closed line in the units of the axes."""
    (left, below), (right, above) = text.get_window_extent().get_points()
    corners = [(left, below), (right, below), (right, above), (left, above), (left, below)]
    return np.asarray(axes.transData.inverted().transform(corners))


def _layers(axes: Axes, columns: Sequence[Column]) -> None:
    """An axis of layers, and the line through the largest error of each."""
    axes.set_xlim(columns[0].layer - 0.7, columns[-1].layer + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:.0f}" if at > OUTSIDE else ""))
    axes.grid(visible=False, axis="x")
    inside = [(column.layer, _finite(column.error, axes)) for column in columns if column.layer != OUTSIDE]
    if len(inside) > 1:
        axes.plot(*zip(*inside, strict=True), color=COLORS["quiet"], linewidth=1, alpha=0.7)
