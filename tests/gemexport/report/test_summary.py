"""The sentence at the end of a run."""

from __future__ import annotations

from typing import Any

from gemexport.report.schema import ArtifactReport, ModelReport, Report
from gemexport.report.summary import closing
from gemexport.shared.measured import Divergence, LogitsReport


def row(name: str, variant: str, status: Any, agreement: float | None = None, **more: Any) -> ArtifactReport:
    loss = None
    if agreement is not None:
        loss = LogitsReport(
            runtime="x", arithmetic="f32", tokens=9,
            loss=Divergence(kld_mean=0.1, kld_max=1, top1_agreement=agreement, perplexity_ratio=1),
        )  # fmt: skip
    return ArtifactReport(format=name, variant=variant, status=status, logits=loss, **more)


def said(*rows: ArtifactReport) -> str:
    model = ModelReport(name="m", architecture="gemma3", parameters=1, bytes=1, source="m")
    return closing(Report(model=model, versions={}, artifacts=rows))


def test_what_is_good_is_told_with_its_users_and_its_cost() -> None:
    gguf = row("gguf", "Q4_0", "pass", 0.98765, path="gguf/m-Q4_0.gguf", bytes=157_500_000)
    npu = row("onnx", "npu-a8-aqlm-2x8", "pass", 1.0, path="onnx/npu", bytes=301_400_000)
    assert said(gguf, npu) == (
        "all of them can be used: gguf/m-Q4_0.gguf for llama.cpp and Ollama (157.5 MB, picks the same next word as "
        "your model 98.7 times in 100), onnx/npu for NPUs (301.4 MB, picks the same next word as your model every time)"
    )
    assert "99.9 times in 100" in said(row("mlx", "4bit", "pass", 0.99999, path="mlx/4bit"))


def test_what_is_not_good_is_named() -> None:
    mlx, coreml = row("mlx", "4bit", "fail", path="mlx/4bit"), row("coreml", "int4", "error")
    assert said(row("onnx", "int4", "pass", path="onnx/int4"), mlx, coreml) == (
        "1 of 3 can be used: onnx/int4 for ONNX Runtime; do not use mlx 4bit and coreml int4, for the reasons above"
    )


def test_what_was_not_judged_is_not_called_good() -> None:
    written = row("gguf", "Q4_0", "skipped", path="gguf/m-Q4_0.gguf", bytes=1000)
    assert said(written, row("mlx", "4bit", "skipped")) == (
        "written, but not judged in full: gguf/m-Q4_0.gguf for llama.cpp and Ollama (1.0 kB)"
    )
    assert said() == "nothing was written"
