"""What a plan says of sizes, held against what runs write; and what it leaves out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import gemexport
from gemexport import InputError, cli, demo
from gemexport.demo import mobile
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.grids.expected import expected
from gemexport.formats.grids.recipe import RECIPES
from gemexport.formats.grids.search import attach, find_grids
from gemexport.registry import TARGETS, split_variants

ALL = ",".join(f"{name}:{variant}" for name, target in TARGETS.items() for variant in target.known_variants)
RANGES = ("onnx:npu-a8", "onnx:npu-a16")  # written once their activations are measured, to other digits


def planned(capsys: pytest.CaptureFixture[str], *given: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    cli.app([*map(str, ("plan", *given)), "--no-validate", "--json"], standalone_mode=False)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def sizes(plan: dict[str, Any]) -> dict[str, int]:
    rows = {row["step"]: row["output_bytes"] for row in plan["steps"]}
    return {step.removeprefix("export "): size for step, size in rows.items() if step.startswith("export ")}


def written(model: Path, out: Path, **options: Any) -> dict[str, int | None]:
    report = gemexport.export(model, out, validate=False, **options)
    return {f"{row.format}:{row.variant}": row.bytes for row in report.artifacts}


@pytest.fixture(
    params=["gemma4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma3", "mobile", "gguf"))]
)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A plain model, one on a lattice, a mobile release, and a GGUF file."""
    kind = request.param
    if kind == "mobile":
        return mobile.make(tmp_path / "mobile", size="tiny")
    made = demo.make(tmp_path / "model", family="gemma4" if kind == "gemma4" else "gemma3", size="tiny")
    if kind != "gguf":
        return made
    gemexport.export(made, tmp_path / "source", formats=["gguf"], validate=False)
    return tmp_path / "source" / "gguf" / "model-Q4_0.gguf"


def test_sizes_are_those_that_all_writes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the byte: the functions that write lay the artefacts out, on grids that a sample of rows tells."""
    out = tmp_path / "out"
    plan = planned(capsys, model, "-o", out)
    assert not out.exists()
    found = written(model, out)
    assert sizes(plan) == found
    assert plan["artifact_bytes"] == sum(size or 0 for size in found.values())
    assert plan["free_bytes"] > plan["disk_bytes"] >= plan["artifact_bytes"]
    # With the grids that the run found it is the same, and nothing is added to the disk.
    again = planned(capsys, model, "-o", out)
    assert sizes(again) == found
    assert again["disk_bytes"] < plan["disk_bytes"]


@pytest.mark.slow
def test_sizes_of_every_variant(tiny_gemma4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = sizes(planned(capsys, tiny_gemma4, "--variants", ALL))
    found = written(tiny_gemma4, tmp_path / "out", variants=split_variants(ALL))
    assert plan.keys() == found.keys()
    for key, size in found.items():
        assert plan[key] == (pytest.approx(size, rel=0.01) if key in RANGES else size), key


@pytest.mark.slow
def test_sizes_with_a_vector_codec(tiny_gemma4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--only", "onnx,coreml", "--ple-codec", "none,aqlm:2x8")
    plan = sizes(planned(capsys, tiny_gemma4, *options))
    found = written(tiny_gemma4, tmp_path / "out", formats=["onnx", "coreml"], ple_codec="none,aqlm:2x8")
    assert plan.keys() == found.keys()
    for key, size in found.items():
        assert plan[key] == pytest.approx(size, rel=0.01), key
    assert plan["onnx:int4-aqlm-2x8"] < plan["onnx:int4"]


@pytest.mark.parametrize("recipe", ["default", "int8", "lossless"])
def test_expected_grids_are_those_that_are_found(recipe: str, tiny_gemma3: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma3)
    guessed = expected(checkpoint, tmp_path / "none", RECIPES[recipe])
    find_grids(checkpoint, tmp_path / "grids", RECIPES[recipe])
    found = attach(checkpoint, tmp_path / "grids")
    assert {name: tensor.grid for name, tensor in guessed.tensors.items()} == {
        name: tensor.grid for name, tensor in found.tensors.items()
    }


def test_what_is_not_installed_is_left_out(
    tiny_gemma3: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemexport.registry._installed", lambda package: package not in ("mlx", "coremltools"))
    plan = planned(capsys, tiny_gemma3)
    assert plan["not_installed"] == ["mlx:4bit", "coreml:int4"]
    assert not any("mlx" in row["step"] or "coreml" in row["step"] for row in plan["steps"])
    monkeypatch.setattr("gemexport.registry._installed", lambda package: False)
    with pytest.raises(InputError, match="nothing is installed that could write"):
        planned(capsys, tiny_gemma3)


def test_what_a_format_refuses_is_told_before_anything_is_searched(
    tmp_path: Path, tiny_gemma3: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search of 31B takes minutes."""
    refused = {"gguf": "llama.cpp cannot run this decoder: of the test's making"}
    monkeypatch.setattr("gemexport.registry.Target.supports", lambda target, *_: refused.get(target.name))
    plan = planned(capsys, tiny_gemma3, "--only", "gguf,mlx")
    assert plan["refused"] == {"export gguf:Q4_0": refused["gguf"]}
    assert sizes(plan).keys() == {"mlx:4bit"}
    heard: list[str] = []
    out = tmp_path / "out"
    report = gemexport.export(
        tiny_gemma3, out, formats=["gguf", "mlx"], validate=False, progress=lambda advance: heard.append(advance.step)
    )
    gguf, mlx = report.artifacts
    assert (gguf.status, gguf.path) == ("error", None)
    assert str(gguf.reason).endswith(f"{refused['gguf']}; leave this format out (--skip gguf)")
    assert mlx.path is not None
    assert "export gguf:Q4_0" not in heard
    shutil.rmtree(out)
    heard.clear()
    with pytest.raises(InputError, match="of the test's making"):
        gemexport.export(tiny_gemma3, out, formats=["gguf"], progress=lambda advance: heard.append(advance.step))
    assert not heard
    assert not out.exists()
