"""Where the report's pictures put things: axes take every number, names never lie on each other, at any width."""

from __future__ import annotations

import math
import re
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemexport import charts
from gemexport.report import ArtifactReport, Divergence, LogitsReport, ModelReport, Report, TensorReport


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


def box(point: charts.Point) -> charts.Box:
    """What a name covers in the widest font."""
    assert point.label is not None
    width = charts.LETTER * len(f"{point.artifact.format} {point.artifact.variant}")
    left = point.label.x - {"start": 0, "middle": width / 2, "end": width}[point.label.anchor]
    return left, point.label.y - 11, left + width, point.label.y + 4


sizes = st.integers(1, 10**12)
losses = st.one_of(st.just(0.0), st.floats(1e-14, 50), st.just(math.inf))
points = st.lists(st.tuples(st.text("abQ48_-", min_size=1, max_size=30), sizes, losses), min_size=1, max_size=24)


@settings(deadline=None, max_examples=60)
@given(points, st.one_of(st.none(), st.floats(1e-6, 1)), st.sampled_from([(358, 330, 70), (720, 340, 90)]))
def test_names_never_overlap_and_all_lies_within_the_frame(
    found: list[tuple[str, int, float]], floor: float | None, size: tuple[int, int, int]
) -> None:
    chart = charts.operating_points(report(found, floor), *size)
    assert chart is not None
    left, top, right, bottom = chart.frame
    assert len(chart.points) == len(found)
    assert all(left <= point.x <= right and top <= point.y <= bottom for point in chart.points)
    assert all(left <= tick.at <= right for tick in chart.xs)
    assert all(top <= tick.at <= bottom for tick in chart.ys)
    boxes = [box(point) for point in chart.points if point.label]
    assert all(left <= b[0] and b[2] <= right + 1 and top - 1 <= b[1] and b[3] <= bottom + 1 for b in boxes)
    assert not any(charts._overlap(one, other) for one, other in combinations(boxes, 2))


def test_six_artefacts_of_a_real_run_all_have_their_names_on_a_phone() -> None:
    found = [("Q4_0", 157_523_392, 0.0057), ("4bit", 202_200_000, 0.00028), ("int4", 185_700_000, 0.00028),
             ("npu", 301_400_000, 0.00028), ("int4.coreml", 160_500_000, 0.00028),
             ("w4a16-compressed", 426_700_000, 0.0001)]  # fmt: skip
    chart = charts.operating_points(report(found, 0.0017), 358, 330, 70)
    assert chart is not None
    assert all(point.label for point in chart.points)
    assert chart.floor is not None


def test_the_front_is_what_loses_least_of_all_that_are_as_small() -> None:
    found = [("big", 300, 0.001), ("worse", 200, 0.5), ("small", 100, 0.1)]
    chart = charts.operating_points(report(found), 720, 340)
    assert chart is not None
    big, worse, small = ((point.x, point.y) for point in chart.points)
    assert small in chart.front
    assert big in chart.front
    assert worse not in chart.front
    assert [x for x, _ in chart.front] == sorted(x for x, _ in chart.front)


def test_what_failed_is_no_choice() -> None:
    whole = report([("broken", 100, 1e-9), ("sound", 200, 0.1)])
    broken = whole.artifacts[0].model_copy(update={"status": "fail"})
    chart = charts.operating_points(whole.model_copy(update={"artifacts": (broken, whole.artifacts[1])}), 720, 340)
    assert chart is not None
    assert [(point.x, point.y) in chart.front for point in chart.points] == [False, True]


def test_nothing_is_drawn_of_what_was_not_measured() -> None:
    assert charts.operating_points(report([]), 720, 340) is None
    assert charts.operating_points(report([("Q4_0", 5, math.nan)]), 720, 340) is None


@settings(deadline=None)
@given(st.lists(losses, min_size=1))
def test_a_logarithmic_axis_keeps_the_order(values: list[float]) -> None:
    axis = charts.Logarithmic.over(values, 0, 100)
    places = [axis.at(value) for value in sorted(values)]
    assert places == sorted(places, reverse=True)
    assert all(0 <= place <= 100 for place in places)
    if 0.0 in values:
        assert axis.at(0.0) == 100
        assert axis.ticks()[-1].text == "0"


@pytest.mark.parametrize(("exponent", "text"), [(-11, "10⁻¹¹"), (0, "1"), (1, "10¹")])
def test_powers_of_ten(exponent: int, text: str) -> None:
    assert charts.power(exponent) == text


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
    assert [kind for kind, _ in chart.groups] == ["attention", "MLP", "other"]
    assert sum(len(re.findall("M", path)) for _, path in chart.groups) == 25
    assert [column.name for column in chart.columns[:2]] == ["outside the layers", "layer 0"]
    assert chart.columns[8].worst.name == "model.layers.7.mlp.down_proj.weight"
    assert [tick.text for tick in chart.xs] == ["0", "5", "10"]


def test_without_errors_there_is_no_picture_of_them() -> None:
    exact = [tensor("model.layers.0.mlp.up_proj.weight", 0.0), tensor("model.layers.1.mlp.up_proj.weight", None)]
    assert charts.layer_errors(exact) is None
    assert charts.layer_errors([]) is None
