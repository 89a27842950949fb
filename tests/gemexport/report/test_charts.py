"""The report's pictures: marks stand where their numbers are, names never lie on each other, colours are the page's."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from gemexport.report import charts, plots, svg
from gemexport.report.render import render_html
from gemexport.report.schema import ArtifactReport, ModelReport, Report
from gemexport.shared.measured import Divergence, LogitsReport, TensorReport


def report(points: list[tuple[str, int, float]], floor: float | None = None) -> Report:
    """A run whose artefacts are these: variant, bytes, loss."""

    def divergence(kld: float) -> Divergence:
        return Divergence(kld_mean=kld, kld_max=kld, top1_agreement=1, perplexity_ratio=1)

    noise = None if floor is None else divergence(floor)
    artifacts = tuple(
        ArtifactReport(
            format="gguf", variant=variant, bytes=size, status="pass",
            logits=LogitsReport(runtime="r", arithmetic="f32", tokens=9, loss=divergence(loss), noise_floor=noise),
        )
        for variant, size, loss in points
    )  # fmt: skip
    model = ModelReport(name="m", architecture="gemma3", parameters=1, bytes=2, source="m")
    return Report(model=model, versions={}, artifacts=artifacts)


REAL = [("Q4_0", 157_523_392, 0.0057), ("4bit", 202_200_000, 0.00028), ("int4", 185_700_000, 0.00028),
        ("npu", 301_400_000, 0.00028), ("int4.coreml", 160_500_000, 0.00028),
        ("w4a16-compressed", 426_700_000, 0.0001)]  # fmt: skip


def drawn(whole: Report, form: str) -> Element:
    chart = charts.operating_points(whole)
    assert chart is not None
    names = [point.artifact.variant for point in chart.points]
    return ElementTree.fromstring(plots.draw_points(chart, form, names, [f"to-{i}" for i in range(len(names))]))


def ticks(picture: Element) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """What is written along both axes, and where its grid line begins."""
    across, up = {}, {}
    for group in picture.iter("g"):
        texts, paths = list(group.iter("text")), list(group.iter("path"))
        if len(texts) == 1 and group.find("g/text") is not None:
            middle = "middle" in texts[0].get("style", "")
            at = [float(n) for n in re.findall(r"[\d.]+", paths[0].get("d", ""))] if paths else []
            x = float(texts[0].get("x", 0))
            (across if middle else up)[texts[0].text or ""] = (at[0], at[1]) if at else (x, math.nan)
    return across, up


def marks(picture: Element) -> list[tuple[float, float]]:
    """Where the artefacts' points are, in their order."""
    uses = [link.findall(".//use")[1] for link in picture.findall("a")]
    return [(float(use.get("x", 0)), float(use.get("y", 0))) for use in uses]


def boxes(picture: Element) -> list[tuple[float, float, float, float]]:
    """What the names cover in bold DejaVu Sans, the widest of the usual fonts: left, top, right, bottom."""
    found = []
    for text in picture.findall("a/text"):
        width = TextPath((0, 0), "".join(text.itertext()), 12, prop=FontProperties(weight="bold")).get_extents().width
        x, y = float(text.get("x", 0)), float(text.get("y", 0))
        anchor = re.search(r"text-anchor: (\w+)", text.get("style", ""))
        left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor[1] if anchor else "start"]
        found.append((left, y - 9, left + width, y))
    return found


@pytest.mark.parametrize("form", plots.SIZES)
def test_points_stand_where_their_numbers_are(form: str) -> None:
    picture = drawn(report(REAL, 0.0017), form)
    across, up = ticks(picture)
    (left, _), (right, _) = across["200 MB"], across["400 MB"]
    (_, high), (_, low) = up["10⁻³"], up["10⁻⁴"]
    for (x, y), (_, size, loss) in zip(marks(picture), REAL, strict=True):
        assert (x - left) / (right - left) == pytest.approx((size - 2e8) / 2e8, abs=1e-3)
        assert (y - high) / (low - high) == pytest.approx(math.log10(1e-3 / loss), abs=1e-3)


def test_zero_stands_below_the_lowest_power_of_ten_and_infinity_at_the_top() -> None:
    picture = drawn(report([("a", 100, 0.0), ("b", 200, 0.002), ("c", 300, math.inf)]), "wide")
    _, up = ticks(picture)
    ys = [y for _, y in marks(picture)]
    assert ys[0] == pytest.approx(up["0"][1], abs=0.02)
    assert up["0"][1] > up["10⁻³"][1] + 10 > ys[1]
    assert ys[2] == pytest.approx(10, abs=0.02)


sizes = st.integers(1, 10**12)
losses = st.one_of(st.just(0.0), st.floats(1e-14, 50), st.just(math.inf))
points = st.lists(st.tuples(st.text("abQ48_-$", min_size=1, max_size=30), sizes, losses), min_size=1, max_size=16)


@settings(max_examples=12, deadline=None)
@given(points, st.one_of(st.none(), st.floats(1e-6, 1)), st.sampled_from(["wide", "narrow"]))
def test_names_never_overlap_and_all_lies_within_the_frame(
    found: list[tuple[str, int, float]], floor: float | None, form: str
) -> None:
    picture = drawn(report(found, floor), form)
    width, height = plots.SIZES[form]
    assert len(picture.findall("a")) == len(found)
    assert all(40 < x < width and 9 <= y < height - 20 for x, y in marks(picture))
    covered = boxes(picture)
    assert all(box[0] > 40 and box[2] < width and box[1] > 0 and box[3] < height - 20 for box in covered)
    for one, other in combinations(covered, 2):
        assert not (one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3])


@pytest.mark.parametrize("form", plots.SIZES)
def test_six_artefacts_of_a_real_run_have_their_names_once(form: str) -> None:
    picture = drawn(report(REAL, 0.0017), form)
    names = ["".join(text.itertext()) for text in picture.iter("text")]
    assert [name for name in names if name.startswith("gguf ")] == [f"gguf {variant}" for variant, _, _ in REAL]
    assert names.count("bf16 noise") == 1
    assert [link.get("href") for link in picture.findall("a")] == [f"#to-{i}" for i in range(6)]
    assert [link.findtext("title") for link in picture.findall("a")] == [variant for variant, _, _ in REAL]
    assert (picture.findtext("title"), picture.findtext("desc")) == (
        "Loss against size", " ".join(f"{variant}." for variant, _, _ in REAL)
    )  # fmt: skip


def test_the_page_gives_colours_and_letters_and_the_same_bytes_come_again() -> None:
    chart = charts.operating_points(report(REAL, 0.0017))
    errors = charts.layer_errors([tensor(f"model.layers.{i}.mlp.up_proj.weight", 0.1 + i) for i in range(4)])
    assert chart is not None
    assert errors is not None
    ids: list[str] = []
    for form in plots.SIZES:
        for text in (
            plots.draw_points(chart, form, ["t"] * 6, ["a"] * 6), plots.draw_layers(errors, form, ["t"] * 4, "a"),
        ):  # fmt: skip
            assert not re.search(r"(fill|stroke): (?!var|none)|font|rgb\(|data:", text)
            assert "var(--" in text
            ids += re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    again = plots.draw_points(chart, "wide", ["t"] * 6, ["a"] * 6)
    assert again == plots.draw_points(chart, "wide", ["t"] * 6, ["a"] * 6)
    with pytest.raises(KeyError):
        svg._style("fill: #123456")


def test_what_is_not_drawn_is_not_imported() -> None:
    code = (
        "import sys, gemexport.cli; from gemexport.report.render import render_html;"
        "from gemexport.report.schema import *;"
        "model = ModelReport(name='m', architecture='gemma3', parameters=1, bytes=2, source='m');"
        "render_html(Report(model=model, versions={}, artifacts=())); sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_matplotlib_says_nothing_of_its_own_folders(tmp_path: Path) -> None:
    code = "from gemexport.report import render; render._plots()"
    (tmp_path / "file").touch()
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path / "file")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("", "")


def test_the_page_has_both_sizes() -> None:
    page = render_html(report(REAL))
    assert page.count('class="points wide"') == page.count('class="points narrow"') == 1


def test_the_front_is_what_loses_least_of_all_that_are_as_small() -> None:
    found = [("big", 300, 0.001), ("worse", 200, 0.5), ("small", 100, 0.1)]
    chart = charts.operating_points(report(found))
    assert chart is not None
    assert [point.artifact.variant for point in chart.front] == ["small", "big"]


def test_what_failed_is_no_choice() -> None:
    whole = report([("broken", 100, 1e-9), ("sound", 200, 0.1)])
    broken = whole.artifacts[0].model_copy(update={"status": "fail"})
    chart = charts.operating_points(whole.model_copy(update={"artifacts": (broken, whole.artifacts[1])}))
    assert chart is not None
    assert [point.artifact.variant for point in chart.front] == ["sound"]


def test_nothing_is_drawn_of_what_was_not_measured() -> None:
    assert charts.operating_points(report([])) is None
    assert charts.operating_points(report([("Q4_0", 5, math.nan)])) is None


@pytest.mark.parametrize(("value", "text"), [(1e-11, "10⁻¹¹"), (1.0, "1"), (10.0, "10¹"), (0.0, "0")])
def test_powers_of_ten(value: float, text: str) -> None:
    assert plots.power(value) == text


def tensor(name: str, error: float | None, shape: tuple[int, ...] = (8, 4)) -> TensorReport:
    return TensorReport(name=name, shape=shape, dtype="bf16", compared=32, exact=0, exact_fraction=0.0,
                        max_relative_error=error or 0.0, rms_relative_error=error)  # fmt: skip


def test_errors_by_layer_name_the_worst_and_draw_each_matrix_once() -> None:
    found = [tensor("model.embed_tokens.weight", 0.2)]
    for at in range(12):
        found += [
            tensor(f"model.layers.{at}.self_attn.q_proj.weight", 0.01),
            tensor(f"model.layers.{at}.mlp.down_proj.weight", 0.1 if at == 7 else 0.001),
            tensor(f"model.layers.{at}.input_layernorm.weight", 0.0, (4,)),
        ]
    chart = charts.layer_errors(found)
    assert chart is not None
    assert {kind: len(found) for kind, found in chart.groups.items()} == {"attention": 12, "MLP": 12, "other": 1}
    assert [column.name for column in chart.columns[:2]] == ["outside the layers", "layer 0"]
    assert chart.columns[8].worst.name == "model.layers.7.mlp.down_proj.weight"
    for form in plots.LAYER_SIZES:
        picture = ElementTree.fromstring(plots.draw_layers(chart, form, [column.name for column in chart.columns], "a"))
        across, _ = ticks(picture)
        assert [text for text in across if text] == ["0", "5", "10"]
        groups = [group for group in picture.iter("g") if len(group) > 1 and all(use.tag == "use" for use in group)]
        assert [len(group) for group in groups] == [12, 12]
        step = (across["10"][0] - across["0"][0]) / 10
        mlp = [(float(use.get("x", 0)) - across["0"][0]) / step for use in groups[1]]
        assert mlp == pytest.approx(range(12), abs=0.02)
        assert min(groups[1], key=lambda use: float(use.get("y", 0))) is groups[1][7]
        hits = [hit for hit in picture if hit.get("class") == "tip hit"]
        assert [hit.findtext("title") for hit in hits] == [column.name for column in chart.columns]


def test_without_errors_there_is_no_picture_of_them() -> None:
    exact = [tensor("model.layers.0.mlp.up_proj.weight", 0.0), tensor("model.layers.1.mlp.up_proj.weight", None)]
    assert charts.layer_errors(exact) is None
    assert charts.layer_errors([]) is None
