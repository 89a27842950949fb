"""The picture of a sweep, drawn by matplotlib as an SVG file: the loss to be expected by size, a line an artefact."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from gemexport.shared.measured import Swept

_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "sweep", "axes.grid": True, "grid.color": "#dddddd", "font.size": 11}


def draw_curves(points: Sequence[Swept]) -> str:
    """The SVG of these points; the same ones give the same text."""
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.add_subplot()
        for name in dict.fromkeys(point.artefact for point in points):
            own = [point for point in points if point.artefact == name and point.loss > 0]
            axes.plot([point.bytes for point in own], [point.loss for point in own], marker="o", label=name)
        axes.set_yscale("log")
        axes.set_ylabel("nats to be expected")
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
        axes.legend(frameon=False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
