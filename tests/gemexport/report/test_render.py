"""The report as people see it: the page, the job summary and the terminal, from one made-up but realistic run."""

from __future__ import annotations

import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from gemexport.report import render
from gemexport.report.schema import (
    ArtifactReport,
    ExportStats,
    FileReport,
    LatticeReport,
    LatticeTensor,
    ModelReport,
    Report,
    ValidationReport,
    verdict,
)
from gemexport.shared.bound import Bound
from gemexport.shared.measured import (
    ChatDifference,
    ChatReport,
    DepartureReport,
    Divergence,
    FactReport,
    GreedyReport,
    GridReport,
    KindLossReport,
    LogitsReport,
    LossReport,
    Pace,
    SpeedReport,
    TensorReport,
    TokenizerDifference,
    TokenizerReport,
    WeightsReport,
)

GRID = GridReport(bits=4, block=32, scale_dtype="bf16", lossless=True)
MATRICES = {
    "self_attn.q_proj": (1024, 640),
    "self_attn.k_proj": (256, 640),
    "self_attn.v_proj": (256, 640),
    "self_attn.o_proj": (640, 1024),
    "mlp.gate_proj": (2048, 640),
    "mlp.up_proj": (2048, 640),
    "mlp.down_proj": (640, 2048),
}
NORMS = {"input_layernorm": 640, "post_attention_layernorm": 640, "self_attn.q_norm": 256, "self_attn.k_norm": 256}
FLOOR = Divergence(kld_mean=0.0034, kld_max=0.081, top1_agreement=0.963, perplexity_ratio=1.00041)

SPEED = SpeedReport(
    threads=1,
    load_seconds=1.25,
    tokens=2208,
    seconds=9.5,
    prefill=Pace(tokens=2048, pieces=8, lower=401.2, median=455.5, upper=490.0),
    decode=Pace(tokens=31, pieces=31, lower=11.1, median=14.3, upper=17.0),
    peak_rss_bytes=402_493_440,
    idle_rss_bytes=105_050_112,
)


def tensor(name: str, shape: tuple[int, ...], fraction: float) -> TensorReport:
    count = 1
    for dimension in shape:
        count *= dimension
    exact = round(count * fraction)
    grid = GRID if len(shape) == 2 else None
    error = 0.0 if exact == count else 0.031
    return TensorReport(
        name=f"{name}.weight",
        shape=shape,
        dtype="bf16",
        grid=grid.model_copy(update={"scale_dtype": "f16"}) if grid else None,
        source_grid=grid,
        compared=count,
        exact=exact,
        exact_fraction=exact / count,
        max_relative_error=error,
        rms_relative_error=error / 3,
    )


def weights(fraction: float = 1.0, layers: int = 18) -> WeightsReport:
    tensors = [tensor("model.embed_tokens", (262144, 640), 1.0)]
    for layer in range(layers):
        for kind, shape in MATRICES.items():
            # The further down the network, the worse: every class of the heat map occurs.
            share = 1.0 if fraction == 1.0 else 1.0 - (1.0 - fraction) * (layer / layers) ** 4 * 1.5
            tensors.append(tensor(f"model.layers.{layer}.{kind}", shape, share))
        tensors += [tensor(f"model.layers.{layer}.{kind}", (size,), 1.0) for kind, size in NORMS.items()]
    tensors.append(tensor("model.norm", (640,), 1.0))
    compared, exact = sum(t.compared for t in tensors), sum(t.exact for t in tensors)
    worst = max(t.max_relative_error for t in tensors)
    return WeightsReport(
        compared=compared,
        exact=exact,
        exact_fraction=exact / compared,
        max_relative_error=worst,
        tensors=tuple(tensors),
    )


def logits(runtime: str, arithmetic: str, conversion: float, loss: float, **more: object) -> LogitsReport:
    def divergence(kld: float) -> Divergence:
        return Divergence(kld_mean=kld, kld_max=kld * 41, top1_agreement=1 - kld**0.5 / 2, perplexity_ratio=1 + kld / 3)

    return LogitsReport.model_validate(
        {
            "runtime": runtime,
            "arithmetic": arithmetic,
            "tokens": 2048,
            "reference": "transformers 5.23.0 · f32",
            "conversion": divergence(conversion),
            "loss": divergence(loss),
            "noise_floor": FLOOR,
            "speed": SPEED,
            "seconds": 21.5,
            **more,
        }
    )


def artifact(
    name: str, variant: str, path: str, size: int, run: str, scores: LogitsReport, **more: object
) -> ArtifactReport:
    digest = hashlib.sha256(path.encode()).hexdigest()
    stored = more.pop("weights", None) or weights()
    assert isinstance(stored, WeightsReport)
    assert scores.conversion is not None
    assert scores.loss is not None
    f32 = scores.arithmetic == "f32"
    limit, origin = (1e-5, "arithmetic f32") if f32 else (2 * FLOOR.kld_mean, "twice PyTorch's bf16 noise floor")
    measured = scores.conversion.kld_mean if f32 else scores.loss.kld_mean
    bounds = (
        Bound.at_least("weights.exact_fraction", stored.exact_fraction, 1.0, "the source lies on a grid it can hold"),
        Bound.at_most("logits.conversion.kld_mean" if f32 else "logits.loss.kld_mean", measured, limit, origin),
        Bound.at_least("tokenizer.equal", 40, 40, "every text"),
    )
    status, reason = verdict(bounds)
    return ArtifactReport.model_validate(
        {
            "format": name,
            "variant": variant,
            "path": path,
            "bytes": size,
            "sha256": digest,
            "files": (FileReport(path=path, bytes=size, sha256=digest),),
            "status": status,
            "reason": reason,
            "run": run,
            "export": ExportStats(seconds=3.2, peak_rss_bytes=212_000_000),
            "weights": stored,
            "tokenizer": TokenizerReport(texts=40, equal=40, name=scores.runtime),
            "logits": scores,
            "bounds": bounds,
            "validation": ValidationReport(seconds=38.5, runtime_seconds=9.5, steps={"weights": 4.0, "run": 9.6}),
            "seconds": 41.7,
            **more,
        }
    )


def sample_report(layers: int = 18) -> Report:
    """Six artefacts, of which ONNX for NPUs fails, one skipped and one that stopped with an error."""
    out = "gemma-3-270m-it-qat"
    difference = TokenizerDifference(text="Café déjà vu — 123 😊", expected=(2, 44, 901), found=(2, 44, 17, 8))
    artifacts = (
        artifact("gguf", "Q4_0", f"gguf/{out}-Q4_0.gguf", 151_212_416, f"llama-server -m out/gguf/{out}-Q4_0.gguf",
                 logits("llama.cpp 2026.10 (xllamacpp)", "int8-activations", 0.0035, 0.0035, top_k=4096),
                 weights=weights(layers=layers)),
        artifact("mlx", "4bit", "mlx/4bit", 184_000_512, "mlx_lm.generate --model out/mlx/4bit --prompt 'Hello'",
                 logits("mlx 0.32.4 (cpu)", "f32", 3.1e-9, 3.1e-9), weights=weights(layers=layers),
                 notes=("Scales are f32: with bf16 scales only 61 % of the values are exact at run time.",)),
        artifact("onnx", "int4", "onnx/int4", 176_300_000, "python -m onnxruntime_genai.models --model out/onnx/int4",
                 logits("onnxruntime 1.32.0", "f32", 2.2e-8, 2.2e-8, greedy=GreedyReport(tokens=32, equal=32)),
                 weights=weights(layers=layers)),
        artifact("onnx", "npu", "onnx/npu", 176_900_000, "python -m onnxruntime_genai.models --model out/onnx/npu",
                 logits("onnxruntime 1.32.0", "f32", 0.41, 0.62), weights=weights(0.4, layers),
                 tokenizer=TokenizerReport(texts=40, equal=39, name="onnxruntime", differences=(difference,))),
        artifact("coreml", "int4", "coreml/int4.mlpackage", 152_900_000, "open out/coreml/int4.mlpackage",
                 logits("MIL evaluator (PyTorch)", "f32", 4e-8, 4e-8), weights=weights(layers=layers),
                 more_logits=(logits("MIL evaluator (PyTorch)", "f16", 0.0002, 0.0002),)),
        ArtifactReport(format="compressed-tensors", variant="w4a16", status="error", seconds=0.4,
                       reason="ImportError: No module named 'compressed_tensors'; pip install 'gemexport[all]'"),
        ArtifactReport(format="gguf", variant="BF16", status="skipped", reason="--skip gguf/BF16"),
    )  # fmt: skip
    found = tuple(
        LatticeTensor(name=t.name, shape=t.shape, dtype="bf16", grid=GRID, grid_fraction=1.0)
        for t in weights(layers=layers).tensors
        if len(t.shape) == 2
    )
    on_grid = weights(layers=layers).compared
    model = ModelReport(
        name=out,
        architecture="gemma3",
        parameters=268_098_176,
        bytes=536_196_352,
        source="checkpoints/gemma-3-270m-it-qat",
        left_out=("vision_tower", "multi_modal_projector"),
        lattice=LatticeReport(weights=on_grid, on_grid=on_grid - 40_000, seconds=1.9, tensors=found),
    )
    return Report(
        model=model,
        recipe="exact",
        versions={"gemexport": "0.1.0", "torch": "2.13.0", "mlx": "0.32.4"},
        artifacts=artifacts,
        machine="AMD EPYC, 2 cores, Linux x86_64",
        jobs=2,
        reference_seconds=61.0,
        seconds=251.3,
        peak_rss_bytes=3_400_000_000,
    )


@pytest.fixture(scope="module")
def report() -> Report:
    return sample_report()


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return render.render_html(report)


class _Page(HTMLParser):
    """Checks that elements nest, and collects the tags with their attributes."""

    VOID = frozenset({"meta", "link", "input", "br", "path", "circle", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parsed(page: str) -> _Page:
    result = _Page()
    result.feed(page)
    result.close()
    return result


def test_page_nests_and_needs_no_network(page: str) -> None:
    found = parsed(page)
    assert found.open == []
    links = [attrs.get(key) for _, attrs in found.tags for key in ("src", "href") if key in attrs]
    assert links
    assert all(link is not None and link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"https?://|@import|url\(", page)
    assert {tag for tag, _ in found.tags}.isdisjoint({"iframe", "object", "img"})


def test_every_link_in_the_page_has_a_target_and_no_id_occurs_twice(page: str) -> None:
    tags = parsed(page).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {str(attrs["href"])[1:] for tag, attrs in tags if tag == "a"} <= set(ids)


def test_page_holds_every_tensor_bound_file_and_reason(report: Report, page: str) -> None:
    # Five artefacts and the source.
    assert page.count("<tr><th>model.layers.17.mlp.down_proj.weight</th>") == 6
    for artifact in report.artifacts:
        assert f'id="{render.anchor(artifact)}"' in page
        assert all(file.sha256 in page for file in artifact.files)
        assert all(bound.metric in page for bound in artifact.bounds)
    assert "No module named &#39;compressed_tensors&#39;" in page
    assert 'id="onnx-npu" open' in page
    assert 'id="mlx-4bit">' in page
    assert "prefers-color-scheme: dark" in page


def test_names_from_outside_cannot_become_markup(report: Report) -> None:
    evil = '<script>alert("1")</script>`|*'
    model = report.model.model_copy(update={"name": evil})
    bad = report.artifacts[0].model_copy(update={"reason": evil, "notes": (evil,), "run": evil, "path": evil})
    changed = report.model_copy(update={"model": model, "artifacts": (bad,)})
    assert "<script>alert" not in render.render_html(changed)
    markdown = render.render_markdown(changed)
    outside_code = [line for line in markdown.splitlines() if not line.startswith("    ")]
    assert "<script>" not in "\n".join(outside_code)
    assert r"\`\|\*" in markdown


def test_rendering_twice_gives_the_same_bytes(report: Report) -> None:
    assert render.render_html(report) == render.render_html(sample_report())
    assert render.render_markdown(report) == render.render_markdown(sample_report())


def test_an_empty_report_renders() -> None:
    model = ModelReport(name="m", architecture="gemma3", parameters=1, bytes=2, source="m")
    nothing = Report(model=model, versions={})
    assert parsed(render.render_html(nothing)).open == []
    assert "| format |" in render.render_markdown(nothing)


def test_measurements_that_are_not_numbers_are_shown_as_such(report: Report) -> None:
    broken = logits("MIL evaluator", "f16", float("nan"), float("inf"))
    changed = report.artifacts[0].model_copy(update={"logits": broken})
    single = report.model_copy(update={"artifacts": (changed,)})
    page = render.render_html(single)
    assert ">NaN<" in page
    assert ">inf<" in page
    assert parsed(page).open == []


def test_markdown_table_has_a_row_for_each_artefact(report: Report) -> None:
    lines = render.render_markdown(report).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| format"))
    end = lines.index("", head)
    rows = [line for line in lines[head + 2 : end] if line.startswith("|")]
    assert len(rows) == len(report.artifacts) == end - head - 2
    # A bar that is not escaped would end a cell.
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {9}
    assert lines[head + 2 + len(rows)] == ""


@pytest.mark.parametrize("width", [60, 80, 200])
def test_terminal_never_cuts_what_is_to_be_copied(report: Report, width: int) -> None:
    stream = io.StringIO()
    render.print_table(report, Console(file=stream, width=width), Path("out"))
    lines = stream.getvalue().splitlines()
    for artifact in report.artifacts:
        assert artifact.run is None or f"  {artifact.run}" in lines
        assert artifact.path is None or any(line.endswith(f"  out/{artifact.path}") for line in lines)
    assert lines[0].split()[:3] == ["format", "size", "exact"]
    starts = {line.index(artifact.status) for artifact in report.artifacts for line in lines
              if line.startswith(f"{artifact.format} {artifact.variant} ")}  # fmt: skip
    assert starts == {lines[0].index("verdict")}


def test_written_reports_agree_and_sums_name_every_file(report: Report, tmp_path: Path) -> None:
    render.write_reports(report, tmp_path)
    reports = {"report.json", "report.html", "report.md", "report.junit.xml"}
    assert {path.name for path in tmp_path.iterdir()} == {*reports, "SHA256SUMS"}
    assert json.loads((tmp_path / "report.json").read_text())["artifacts"][0]["format"] == "gguf"
    sums = dict(reversed(line.split("  ", 1)) for line in (tmp_path / "SHA256SUMS").read_text().splitlines())
    assert sums == {file.path: file.sha256 for artifact in report.artifacts for file in artifact.files}


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(1.0, "100 %"), (0.0, "0 %"), (0.999999999, "99.9999999 %"), (0.963, "96.30 %"), (1e-7, "0.00001 %"), (None, "–")],
)  # fmt: skip
def test_a_share_never_rounds_to_everything_or_nothing(fraction: float | None, text: str) -> None:
    assert render.share(fraction) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0034, "0.0034"), (2.13e-9, "2.1e-9"), (0.0, "0"), (3e12, "3e12"), (None, "–")]
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert render.number(value) == text


def test_sizes_and_times() -> None:
    assert [render.size(n) for n in (999, 1000, 999_960, 536_196_352, 9_300_000_000)] == [
        "999 B", "1.0 kB", "1.0 MB", "536.2 MB", "9.3 GB",
    ]  # fmt: skip
    assert [render.seconds(t) for t in (0.416, 12.34, 247.0)] == ["0.42 s", "12.3 s", "4 min 07 s"]
    assert render.quantity(268_098_176) == "268.1 M"


def test_speed_stands_beside_what_it_was_measured_in_and_on(report: Report, page: str) -> None:
    speeds = page[page.index("Speed and memory") : page.index("<h2>Artefacts</h2>")]
    assert speeds.count('data-label="decode, tokens/s" data-v="14.3">14.3 <span class="spread">11.1–17.0</span>') == 6
    assert speeds.count(">4.1 ×</span>") == 5
    markdown = render.render_markdown(report)
    for text in (speeds, markdown):
        assert "no part of a verdict" in text
        assert ", 1 thread a runtime, up to 2 steps side by side" in text
        assert "AMD EPYC, 2 cores, Linux x86" in text
    row = "| gguf Q4\\_0 | llama.cpp 2026.10 (xllamacpp), int8-activations | 456 (401–490) | 14.3 (11.1–17.0) |"
    assert row in markdown


def test_every_artefact_with_a_loss_is_a_point_that_says_what_it_is(report: Report, page: str) -> None:
    for kind in ("wide", "narrow"):
        chart = page[page.index(f'<svg class="points {kind}"') :]
        chart = chart[: chart.index("</svg>")]
        assert chart.count('<a href="#') == 5
        assert "<title>gguf Q4_0: 151.2 MB, loss 0.0035 nats, 100 % exact, decodes 14.3 tokens/s, pass</title>" in chart
    assert re.search(r'<a href="#onnx-npu" class="tip fail"><title>.*?</title>.*?fill: var\(--fail\)', page)


def test_tensors_stand_in_the_order_of_their_error(page: str) -> None:
    failing = page[page.index('id="onnx-npu"') : page.index('id="coreml-int4"')]
    errors = [float(error) for error in re.findall(r"<tr><th>model.*<td>([^<]*)</td></tr>", failing)]
    assert len(errors) == 200
    assert errors[0] > errors[-1] == 0
    assert errors == sorted(errors, reverse=True)
    tensors = [tensor("a", (8, 4), 1.0), tensor("b", (8, 4), 0.5), tensor("c", (8, 4), 0.5)]
    tensors[2] = tensors[2].model_copy(update={"rms_relative_error": float("nan")})
    assert [item.name for item in render.by_error(tensors)] == ["c.weight", "b.weight", "a.weight"]


def test_a_large_models_page_stays_small(report: Report) -> None:
    page = render.render_html(sample_report(layers=60))
    assert len(page.encode()) < 900_000


@pytest.mark.parametrize(
    ("value", "text"), [(1694.4, "1694"), (99.96, "100"), (14.32, "14.3"), (0.516, "0.52"), (None, "–")]
)
def test_rates_have_three_digits(value: float | None, text: str) -> None:
    assert render.rate(value) == text


def test_what_differs_is_told_where_it_can_be_seen(report: Report) -> None:
    first = report.artifacts[0]
    text = TokenizerDifference(text="a\u200b\x1b b", expected=(1,), found=(2,), runtime=True)
    changed = first.model_copy(update={
        "facts": (FactReport(name="rope_theta", found="1e4", expected="1e6"),),
        "tokenizer": TokenizerReport(texts=2, equal=1, vocabulary=("two tokens changed places",), differences=(text,)),
        "departs": DepartureReport(layer=3, name="layer 3", relative_error=0.5, limit=0.001),
        "chat": ChatReport(engine="llama.cpp", conversations=2, equal=1, differences=(
            ChatDifference(conversation="two turns", expected="x" * 900 + "<model>", found="x" * 900 + "<modes>"),)),
    })  # fmt: skip
    assert render.differs(changed) == [
        "rope_theta is 1e4, the checkpoint says 1e6", "two tokens changed places",
        "it departs at layer 3, whose output is off by 0.5 of its size",
    ]  # fmt: skip
    told = changed.model_copy(update={"reason": "kld: " + str(changed.departs)})
    assert len(render.differs(told)) == 2
    page = render.render_html(report.model_copy(update={"artifacts": (changed,)}))
    assert parsed(page).open == []
    assert r"<code>a\u200b\x1b b</code>" in page
    assert "1 of 2 conversations" in page
    assert f"<code>…{'x' * 95}&lt;modes&gt;</code>" in page


def test_axis_is_logarithmic_and_takes_everything() -> None:
    assert [render.on_axis(kld, 100) for kld in (0.0, 1e-12, 1e-11, 1e-5, 10.0, float("inf"))] == [
        0.0, 0.0, 0.0, 50.0, 100.0, 100.0,
    ]  # fmt: skip
    assert render.on_axis(float("nan"), 100) is None
    assert render.on_axis(None, 100) is None


def test_heat_map_puts_layers_in_columns_and_kinds_in_rows() -> None:
    tensors = [
        tensor("model.embed_tokens", (8, 4), 1.0),
        tensor("model.layers.0.mlp.up_proj", (8, 4), 1.0),
        tensor("model.layers.3.mlp.up_proj", (8, 4), 0.5),
    ]
    found = render.heat_map(tensors)
    assert found.columns == 4
    assert [(kind, [(cell.column, cell.level) for cell in cells]) for kind, cells in found.rows] == [
        ("embed_tokens", [(0, 0)]),
        ("mlp.up_proj", [(0, 0), (3, 4)]),
    ]


def test_names_of_strangers_do_nothing_to_a_terminal_or_a_page() -> None:
    """ESC and BEL, a line feed, a turn of the direction of text, and a byte that is no UTF-8."""
    name, escaped = "a\x1b[2J\x07\u202eb\udcff", "a\\x1b[2J\\x07\\u202eb\\udcff"
    plain = sample_report(layers=1)
    first = plain.artifacts[0]
    assert first.weights is not None
    tensors = tuple(item.model_copy(update={"name": f"{name}.{item.name}"}) for item in first.weights.tensors)
    stored = first.weights.model_copy(update={"tensors": tensors, "missing": (name,), "exact_fraction": 0.5})
    changes = {
        "path": f"gguf/{name}\nc.gguf",
        "run": f"run {name}\nc",
        "reason": name,
        "notes": (name,),
        "weights": stored,
    }
    model = plain.model.model_copy(update={"name": name, "notes": (name,), "left_out": (name,), "source": name})
    report = plain.model_copy(update={"model": model, "artifacts": (first.model_copy(update=changes),)})
    console = Console(file=io.StringIO(), width=200)
    render.print_table(report, console, Path(f"out{name}"))
    assert isinstance(console.file, io.StringIO)
    table = console.file.getvalue()
    assert f"out{escaped}/gguf/{escaped}\\nc.gguf" in table
    assert f"run {escaped}\\nc\n" in table
    markdown, page = render.render_markdown(report), render.render_html(report)
    assert f"    run {escaped}\\nc\n" in markdown
    assert f"<code>run {escaped}\\nc</code>" in page
    for text in (table, markdown, page):
        assert not set("\x1b\x07\u202e\udcff") & set(text.removesuffix("\n"))


def test_a_loss_is_called_by_its_name_in_its_colour_everywhere() -> None:
    kinds = tuple(
        KindLossReport(kind=kind, tokens=104, word=word, kld_mean=kld, changed=kld / 2, noise=0.001)
        for kind, word, kld in (("code", "lossy", 0.125), ("prose", "near", 0.0123))
    )
    loss = LossReport(word="lossy", kind="code", kld_mean=0.0456, runtime="x", arithmetic="f32", kinds=kinds)
    sample = sample_report(2)
    artifacts = (sample.artifacts[0].model_copy(update={"loss": loss, "status": "pass", "reason": None}),)
    report = sample.model_copy(update={"artifacts": artifacts})
    console = Console(record=True, width=200, force_terminal=True, file=io.StringIO())
    render.print_table(report, console)
    row = next(line for line in console.export_text(styles=True).splitlines() if "Q4_0" in line)
    assert "0.046 \x1b[33mlossy\x1b[0m" in row
    assert re.search(r"\x1b\[33m\s*pass", row)
    assert "\x1b[32m" not in row
    markdown, page = render.render_markdown(report), render.render_html(report)
    assert "| 0.046 lossy |" in markdown
    assert "| 🟡 pass |" in markdown
    assert "✅" not in markdown
    assert "0.12, 6.25 % changed: lossy (bf16 0.001)" in markdown
    assert '<span class="word lossy">lossy</span>, which code texts decide' in page
    assert '<span class="verdict pass lossy">pass</span>' in page
