"""A report for people: one HTML file that needs no network, Markdown for a job summary, and a table on the terminal.

Nothing is computed here that the report does not hold; the templates beside this module only lay it out.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from gemexport.formats.storage.errors import shown
from gemexport.report.charts import LAYER, Column, LayerErrors, OperatingPoints, layer_errors, operating_points
from gemexport.report.checksums import write_sums
from gemexport.report.junit import render_junit
from gemexport.report.schema import JSON, ArtifactReport, Report, write_text
from gemexport.shared.measured import ChatDifference, Divergence, LogitsReport, LossReport, Pace, TensorReport
from gemexport.shared.vectors import VectorLoss
from gemexport.shared.widths import called, short

NONE = "–"
EXCERPT = 400  # letters of a conversation that are shown
STYLES: Mapping[str, str] = {
    "pass": "green", "partial": "yellow", "fail": "bold red", "error": "bold red", "written": "dim", "skipped": "dim",
}  # fmt: skip
LOSS_STYLES: Mapping[str, str] = {"lossless": "green", "near": "green", "lossy": "yellow", "poor": "bold red"}
_MARKS: Mapping[str, str] = {
    "pass": "✅ pass", "partial": "⚠️ partial", "fail": "❌ **fail**", "error": "❌ **error**", "written": "📝 written",
    "skipped": "⏭️ skipped",
}  # fmt: skip
# The KLD plot's logarithmic axis: from what f32 arithmetic leaves on a small model to what a broken model shows.
_DECADES = (-11, 1)
# Lower ends of the heat map's classes of exact fractions; the first is "every weight".
_EXACT_CLASSES = (1.0, 0.9999, 0.99, 0.9, 0.5)


def write_reports(report: Report, out: Path) -> None:
    """Write `report.json`, `.html`, `.md`, `.junit.xml` and `SHA256SUMS` into `out`. Raises InputError."""
    write_text(out / JSON, report.to_json())
    write_text(out / "report.html", render_html(report))
    write_text(out / "report.md", render_markdown(report))
    write_text(out / "report.junit.xml", render_junit(report))
    write_sums(out, report.artifacts)


def load_templates() -> None:
    """Have the reports' templates compiled, which takes longer than filling them in."""
    _environment(html=True).get_template("report.html")
    _environment(html=False).get_template("report.md")


def render_html(report: Report) -> str:
    """The report as one self-contained page: its style and script are inside, and it asks no server anything."""
    return _environment(html=True).get_template("report.html").render(report=report)


def render_markdown(report: Report) -> str:
    """The report in GitHub's Markdown, short enough for a job summary or the notes of a release."""
    return _environment(html=False).get_template("report.md").render(report=report)


def print_table(report: Report, console: Console, out: Path | None = None) -> None:
    """Print one row for each artefact with its path (under `out`), the line that runs it and why it failed.

    Paths and command lines are never cut or folded, so that they can be copied.
    """
    headings = ("format", "size", "exact", "KLD conversion", "KLD loss", "verdict")
    rows = [_terminal_row(artifact) for artifact in report.artifacts]
    widths = [max(cell_len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    paths = [shown(_under(out, artifact.path)) for artifact in report.artifacts]
    used = sum(widths) + 2 * len(widths)
    beside = used + max((cell_len(path) for path in paths), default=0) <= console.width
    title = _line(headings, widths, "bold", "bold") + (Text("  path", "bold") if beside else "")
    console.print(title, soft_wrap=True)
    for artifact, row, path in zip(report.artifacts, rows, paths, strict=True):
        line = _line(row, widths, "", style_of(artifact))
        if artifact.loss:
            _colour(line, sum(widths[:-1]) + 2 * (len(widths) - 2), artifact.loss.word)
        below = [Text(f"  {shown(artifact.run)}", "dim")] if artifact.run else []
        if path and beside:
            line += Text(f"  {path}")
        elif path:
            below.insert(0, Text(f"  {path}"))
        if artifact.reason:
            below.append(Text(f"  {shown(artifact.reason)}", STYLES[artifact.status]))
        if artifact.loss and (moved := choice(artifact.loss)) is not None:
            below.append(Text(f"  {moved}"))
        if artifact.vector_loss:
            told = vector_loss(artifact.vector_loss)
            below.append(Text(f"  {artifact.vector_loss.word}: {told}", LOSS_STYLES[artifact.vector_loss.word]))
        if artifact.stand_in:
            below.append(Text(f"  {artifact.stand_in}", "yellow"))
        for text in (line, *below):
            text.rstrip()
            console.print(text, soft_wrap=True, highlight=False)


def _terminal_row(artifact: ArtifactReport) -> tuple[str, ...]:
    logits = artifact.logits
    return (
        f"{artifact.format} {artifact.variant}{narrower(artifact)}",
        size(artifact.bytes),
        share(artifact.weights.exact_fraction if artifact.weights else None),
        number(logits.conversion.kld_mean if logits and logits.conversion else None),
        loss(artifact),
        artifact.status,
    )


def style_of(artifact: ArtifactReport) -> str:
    """The style of a verdict's word: green where nothing is wrong and next tokens are the source's."""
    if artifact.status == "pass" and artifact.loss and artifact.loss.word == "lossy":
        return LOSS_STYLES["lossy"]
    return STYLES[artifact.status]


def loss(artifact: ArtifactReport) -> str:
    """The loss in nats and what it is called: `0.0035 near`."""
    logits = artifact.logits
    if artifact.loss is None:
        return number(logits.loss.kld_mean if logits and logits.loss else None)
    return f"{number(artifact.loss.kld_mean)} {artifact.loss.word}"


def choice(loss: LossReport) -> str | None:
    """By how much a model's verdict, the probability of one of two tokens, is another; None where it has none."""
    if loss.choice_mean is None:
        return None
    moved = f"{number(loss.choice_mean)} on average, {number(loss.choice_max)} at most"
    return f"the verdict's probability, P(Yes) / (P(Yes) + P(No)), is off by {moved}"


def vector_loss(loss: VectorLoss) -> str:
    """What a loss of vectors is, in half a sentence: `1 - cosine is 0.0012, 0.4 % of how far apart texts are`."""
    share_of = f"{share(loss.share)} of how far apart unrelated texts are"
    return f"1 - cosine of a text's vector is {number(loss.distance_mean)}; in {loss.kind} texts, the worst, {share_of}"


def _colour(line: Text, end: int, word: str) -> None:
    """Give the word that ends in this column its colour; columns are letters here, names may be wider."""
    at = line.plain.rfind(word, 0, end)
    line.stylize(LOSS_STYLES[word], at, at + len(word))


def _line(cells: Iterable[str], widths: list[int], style: str, last: str) -> Text:
    first, *middle, verdict = cells
    text = Text(first + " " * (widths[0] - cell_len(first)), style)
    for cell, width in zip(middle, widths[1:-1], strict=True):
        text.append("  " + " " * (width - cell_len(cell)) + cell, style)
    return text.append("  " + verdict + " " * (widths[-1] - cell_len(verdict)), last)


def _under(out: Path | None, path: str | None) -> str:
    return "" if path is None else str(out / path) if out else path


def size(count: int | None) -> str:
    """Bytes with a decimal prefix and four digits: `151.2 MB`."""
    return _prefixed(count, ("B", "kB", "MB", "GB", "TB"))


def quantity(count: int | None) -> str:
    """A number of things with four digits: `268.1 M`."""
    return _prefixed(count, ("", "k", "M", "G", "T")).rstrip()


def _prefixed(count: int | None, units: tuple[str, ...]) -> str:
    if count is None:
        return NONE
    value, unit = float(count), 0
    while value >= 999.95 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.{1 if unit else 0}f} {units[unit]}"


def share(fraction: float | None) -> str:
    """A fraction as a percentage that never says 100 % for less than everything, nor 0 % for more than nothing."""
    if fraction is None or math.isnan(fraction):
        return NONE if fraction is None else "NaN"
    if fraction in (0.0, 1.0):
        return f"{fraction * 100:.0f} %"
    digits = 2
    while digits < 12 and float(f"{fraction * 100:.{digits}f}") in (0.0, 100.0):
        digits += 1
    return f"{fraction * 100:.{digits}f} %"


def number(value: float | None) -> str:
    """A measured number to two digits: `0.0034`, `2.1e-9`."""
    if value is None:
        return NONE
    if math.isnan(value):
        return "NaN"
    return re.sub(r"e([+-])0?(\d+)$", _exponent, f"{value:.2g}")


def _exponent(found: re.Match[str]) -> str:
    return f"e{found[1].lstrip('+')}{found[2]}"


def precise(value: float) -> str:
    """A bound or what is held against it, with digits enough to tell them apart: `0.9991`, `40`, `1e-5`."""
    return re.sub(r"e([+-])0?(\d+)$", _exponent, f"{value:.6g}")


def thousands(count: int) -> str:
    """A count in groups of three: `268 098 176`."""
    return f"{count:,}".replace(",", "\u202f")


def ratio(value: float | None) -> str:
    """A ratio near one with five decimals: `1.00002`."""
    return NONE if value is None else f"{value:.5f}"


def seconds(value: float | None) -> str:
    """A duration: `0.42 s`, `12.3 s`, `4 min 07 s`."""
    if value is None:
        return NONE
    if value >= 120:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def rate(value: float | None) -> str:
    """Tokens a second with three digits: `1694`, `14.3`, `0.52`."""
    if value is None:
        return NONE
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def spread(pace: Pace | None) -> str:
    """The quartiles of a pace: `891–990`; that it was measured but once where that is so."""
    if pace is None:
        return ""
    return f"{rate(pace.lower)}–{rate(pace.upper)}" if pace.pieces > 1 else "once"


def shape(dimensions: tuple[int, ...]) -> str:
    """A shape as it is read: `640 × 2048`; a scalar's is `scalar`."""
    return " × ".join(str(dimension) for dimension in dimensions) or "scalar"


@dataclass(frozen=True)
class Cell:
    """One tensor in the heat map: its column (the layer, or 0), its class from 0 (exact) to 5, and the tensor."""

    column: int
    level: int
    tensor: TensorReport


@dataclass(frozen=True)
class HeatMap:
    """Tensors by kind (a row each, in the order of the model) and layer (a column each)."""

    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    columns: int

    @property
    def label_width(self) -> int:
        """Pixels that the longest kind takes in the map's monospaced letters."""
        return 8 + math.ceil(6.4 * max((len(name) for name, _ in self.rows), default=5))


def heat_map(tensors: Iterable[TensorReport]) -> HeatMap:
    """Lay out an artefact's tensors by kind and layer, each with the class of its exact fraction."""
    rows: dict[str, list[Cell]] = {}
    for tensor in tensors:
        found = LAYER.match(tensor.name)
        column = int(found[1]) if found else 0
        rows.setdefault(kind(tensor.name), []).append(Cell(column, level(tensor), tensor))
    columns = 1 + max((cell.column for cells in rows.values() for cell in cells), default=-1)
    return HeatMap(tuple((name, tuple(cells)) for name, cells in rows.items()), columns)


def level(tensor: TensorReport) -> int:
    """The class of a tensor's exact fraction: 0 (every weight) to 5 (less than half)."""
    return next((i for i, low in enumerate(_EXACT_CLASSES) if tensor.exact_fraction >= low), 5)


def on_axis(kld: float | None, width: float) -> float | None:
    """Where a KL divergence lies on a logarithmic axis of `width` pixels; the ends take what lies beyond them.

    None where there is none to show (not measured, or NaN).
    """
    if kld is None or math.isnan(kld):
        return None
    low, high = _DECADES
    position = (math.log10(kld) - low) / (high - low) if 0 < kld < math.inf else float(kld > 0)
    return round(width * min(max(position, 0.0), 1.0), 1)


def draw_points(chart: OperatingPoints, form: str) -> Markup:
    """The plot of loss against size as SVG, `wide` or `narrow`; each point leads to its artefact's section."""
    artifacts = [point.artifact for point in chart.points]
    titles, targets = [describe(item) for item in artifacts], [anchor(item) for item in artifacts]
    return Markup(_plots().draw_points(chart, form, titles, targets))


def draw_layers(chart: LayerErrors, form: str, artifact: ArtifactReport) -> Markup:
    """The plot of an artefact's errors by layer as SVG, `wide` or `narrow`."""
    titles = [describe_layer(column) for column in chart.columns]
    return Markup(_plots().draw_layers(chart, form, titles, anchor(artifact)))


def _plots() -> ModuleType:
    """gemexport.report.plots, imported to draw; what matplotlib says of fonts and folders is dropped."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from gemexport.report import plots
    finally:
        logger.setLevel(level)
    return plots


def describe(artifact: ArtifactReport) -> str:
    """An artefact whose loss was measured, in a line: `gguf Q4_0: 151.2 MB, loss 0.0035 nats, 100 % exact, pass`."""
    logits = artifact.logits
    loss = logits.loss.kld_mean if logits and logits.loss else None
    parts = [size(artifact.bytes), f"loss {number(loss)} nats"]
    if artifact.weights:
        parts.append(f"{share(artifact.weights.exact_fraction)} exact")
    if logits and logits.speed and logits.speed.decode:
        parts.append(f"decodes {rate(logits.speed.decode.median)} tokens/s")
    return f"{artifact.format} {artifact.variant}: {', '.join([*parts, artifact.status])}"


def describe_layer(column: Column) -> str:
    """A layer's errors in a line: `layer 7: 0.012 in mlp.down_proj, the largest of 7`."""
    rank = f"the largest of {column.count}" if column.count > 1 else "the only one"
    return shown(f"{column.name}: {number(column.error)} in {kind(column.worst.name)}, {rank}")


def divergences(artifact: ArtifactReport) -> list[tuple[str, str, Divergence]]:
    """Every divergence that was measured: in which runtime and arithmetic, what of, and the numbers."""
    found: list[tuple[str, str, Divergence]] = []
    for logits in (artifact.logits, *artifact.more_logits):
        if logits is None:
            continue
        where = f"{logits.runtime} · {logits.arithmetic}"
        measured = ((where, "conversion", logits.conversion), (where, "loss", logits.loss))
        found += [(runtime, question, numbers) for runtime, question, numbers in measured if numbers is not None]
    if artifact.logits and artifact.logits.noise_floor:
        found.append(("PyTorch bf16 against its f32", "noise floor", artifact.logits.noise_floor))
    return found


def runs(artifact: ArtifactReport) -> list[LogitsReport]:
    """The runs of an artefact whose speed was measured."""
    return [logits for logits in (artifact.logits, *artifact.more_logits) if logits and logits.speed]


def by_error(tensors: Iterable[TensorReport]) -> list[TensorReport]:
    """Tensors by error, the largest first; NaN is the largest."""

    def key(tensor: TensorReport) -> tuple[float, ...]:
        errors = (tensor.rms_relative_error or 0.0, tensor.max_relative_error)
        return tuple(-math.inf if math.isnan(error) else -error for error in errors)

    return sorted(tensors, key=key)


def kind(name: str) -> str:
    """A tensor's name without its layer: `mlp.down_proj`."""
    found = LAYER.match(name)
    return (found[2] if found else name.removeprefix("model.")).removesuffix(".weight")


def differs(artifact: ArtifactReport) -> list[str]:
    """What is not the checkpoint's, in sentences that the verdict's reason does not have already."""
    found = [str(fact) for fact in artifact.facts]
    found += artifact.tokenizer.vocabulary if artifact.tokenizer else ()
    found += [str(artifact.departs)] if artifact.departs else []
    return [sentence for sentence in found if sentence not in (artifact.reason or "")]


def narrower(artifact: ArtifactReport) -> str:
    """What follows the name of an artefact that has fewer weights of its name's bits than the name promises."""
    held = short(artifact.variant, artifact.widths)
    return "" if held is None else f" ({100 * held:.0f} % in {called(artifact.variant)} bits)"


def visible(text: str) -> str:
    """Text with what cannot be seen written out: `\\x1b[0m`, `a\\u200bb`; spaces stay."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def excerpts(difference: ChatDifference) -> tuple[tuple[str, str], ...]:
    """Who laid it out, and what from shortly before the first letter that differs."""
    pairs = zip(difference.expected, difference.found, strict=False)
    first = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    at = min(len(difference.expected), len(difference.found)) if first is None else first
    start = max(0, at - EXCERPT // 4)
    sides = (("checkpoint", difference.expected), ("artefact", difference.found))
    return tuple((who, f"{'…' if start else ''}{text[start : start + EXCERPT]}") for who, text in sides)


def mark(artifact: ArtifactReport) -> str:
    """A verdict in Markdown, with a sign that is green where nothing is wrong and next tokens are the source's."""
    lossy = artifact.status == "pass" and style_of(artifact) != STYLES["pass"]
    return "🟡 pass" if lossy else _MARKS[artifact.status]


def anchor(artifact: ArtifactReport) -> str:
    """The artefact's id in the page."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", f"{artifact.format}-{artifact.variant}")


def _cell(text: object) -> str:
    """Text for a cell of a Markdown table: on one line, and nothing in it that Markdown or HTML would act on."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|`*_\[\]~])", r"\\\1", plain)


def _indented(text: str) -> str:
    """A Markdown code block, which no character of `text` can end."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _finalized(value: object) -> object:
    """What a template shows: the text of strangers does nothing to a terminal or a browser."""
    return shown(value, lines=True) if type(value) is str else value


@cache
def _environment(html: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("gemexport.report", "templates"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finalized,
    )
    figures: tuple[Any, ...] = (size, quantity, thousands, share, number, precise, ratio, rate, spread, seconds, shape)
    pictures: tuple[Any, ...] = (heat_map, level, on_axis, operating_points, layer_errors, draw_points, draw_layers)
    parts: tuple[Any, ...] = (
        anchor,
        mark,
        loss,
        choice,
        kind,
        by_error,
        runs,
        divergences,
        differs,
        narrower,
        visible,
        shown,
        excerpts,
    )
    environment.filters |= {helper.__name__: helper for helper in (*figures, *pictures, *parts)}
    environment.filters |= {"cell": _cell, "indented": _indented}
    return environment
