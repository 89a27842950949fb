"""Whole runs: from a checkpoint to judged artefacts, from the command line and from Python."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gemexport
from gemexport import demo
from gemexport.cli import main
from gemexport.demo.qat import RULES
from gemexport.report.schema import Report, read_report


def run(*arguments: str | Path) -> int:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return int(ended.value.code or 0)


def check_sums(out: Path) -> None:
    lines = (out / "SHA256SUMS").read_text().splitlines()
    assert lines
    for line in lines:
        digest, name = line.split("  ", 1)
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest


@pytest.fixture(scope="session")
def exported(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Gemma 4 in every format, judged."""
    out = tmp_path_factory.mktemp("runs") / "out"
    gemexport.export(tiny_gemma4, out, tokens=200)
    return out


@pytest.mark.slow
def test_all_six_artefacts_pass(exported: Path) -> None:
    report = read_report(exported / "report.json")
    assert [(item.format, item.variant, item.status, item.reason) for item in report.artifacts] == [
        ("gguf", "Q4_0", "pass", None),
        ("mlx", "4bit", "pass", None),
        ("onnx", "int4", "pass", None),
        ("onnx", "npu", "pass", None),
        ("coreml", "int4", "pass", None),
        ("compressed-tensors", "w4a16", "pass", None),
    ]
    for item in report.artifacts:
        assert item.weights
        assert all(tensor.exact_fraction == 1 for tensor in item.weights.tensors if len(tensor.shape) == 2)
    check_sums(exported)
    assert not (exported / ".gemexport" / "reference").exists()


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["gguf/*.gguf", "mlx/4bit/*.safetensors", "onnx/int4/*.data*"])
def test_a_byte_changed_in_the_middle_is_caught_and_named(
    pattern: str, exported: Path, tiny_gemma4: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = exported.glob(pattern)
    whole = file.read_bytes()
    artifact = file if file.suffix == ".gguf" else file.parent
    middle = len(whole) // 2
    try:
        file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0x5A]) + whole[middle + 1 :])
        assert run("validate", tiny_gemma4, artifact, "--tokens", "50", "--json") == 1
    finally:
        file.write_bytes(whole)
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "fail"
    damaged = [item["name"] for item in report["weights"]["tensors"] if item["exact_fraction"] < 1]
    assert len(damaged) == 1


@pytest.mark.slow
def test_greedy_continuations_agree_at_full_precision(tmp_path: Path) -> None:
    model = demo.make(tmp_path / "model", size="tiny", seed=3)
    variants = {
        "gguf": ("F32",),
        "mlx": ("f32",),
        "onnx": ("f32",),
        "coreml": ("f32",),
        "compressed-tensors": ("bf16",),
    }
    report = gemexport.export(model, tmp_path / "out", variants=variants, tokens=64)
    for item in report.artifacts:
        assert item.logits
        assert item.logits.greedy
        assert (item.format, item.logits.greedy.equal) == (item.format, 32)


def export_plain(model: Path, out: Path, *formats: str) -> Report:
    return gemexport.export(model, out, formats=list(formats), validate=False)


@pytest.mark.parametrize("name", ["gguf", "mlx", "onnx", "coreml", "compressed-tensors"])
def test_the_same_input_gives_the_same_bytes(name: str, tiny_gemma4: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert export_plain(tiny_gemma4, tmp_path / folder, name).artifacts[0].status == "written"
    assert (tmp_path / "a" / "SHA256SUMS").read_text() == (tmp_path / "b" / "SHA256SUMS").read_text()
    check_sums(tmp_path / "a")


def test_a_second_run_takes_the_place_of_the_first(tiny_gemma3: Path, tmp_path: Path) -> None:
    for _ in range(2):
        export_plain(tiny_gemma3, tmp_path / "out", "gguf", "mlx")
    names = sorted(path.name for path in (tmp_path / "out").rglob("*") if "partial" in path.name)
    assert names == []
    check_sums(tmp_path / "out")


def test_json_is_all_there_is_on_standard_output(
    tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("gguf", tiny_gemma3, "-o", tmp_path / "out", "--no-validate", "--json") == 0
    printed = Report.model_validate_json(capsys.readouterr().out)
    assert printed == read_report(tmp_path / "out" / "report.json")


def test_plan_says_what_a_format_will_refuse(
    tiny_gemma4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_gemma4, model)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["sliding_attention"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    (model / "config.json").write_text(json.dumps(config))
    assert run("plan", str(model), "--json", "--only", "gguf,mlx") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["refused"] == {
        "export gguf:Q4_0": "llama.cpp cannot run this decoder: the RoPE of its sliding layers is scaled"
    }
    steps = {step["step"] for step in plan["steps"]}
    assert "export mlx:4bit" in steps
    assert "export gguf:Q4_0" not in steps
    assert run("plan", str(model), "--only", "gguf") == 0
    assert "export gguf:Q4_0 will be refused: llama.cpp cannot run" in capsys.readouterr().out


def test_plan_runs_nothing(
    tiny_gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main_plan = ["plan", str(tiny_gemma4), "--json"]
    assert run(*main_plan) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["step"] for step in steps][:3] == ["grids", "round", "export gguf:Q4_0"]
    assert {need for step in steps for need in step["after"]} <= {step["step"] for step in steps}
    assert not list(tmp_path.iterdir())


def test_inspect_a_checkpoint_and_an_artefact(
    tiny_gemma4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_plain(tiny_gemma4, tmp_path / "out", "gguf")
    assert run("inspect", tiny_gemma4, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "gemma4"
    assert facts["grids"][0]["grid"] == "int4, blocks of 32 (sampled)"
    assert run("inspect", tmp_path / "out" / "gguf" / "tiny-gemma4-Q4_0.gguf", "--json") == 0
    assert json.loads(capsys.readouterr().out)["grids"][0]["grid"] == "int4, blocks of 32, f16 scales"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, gemexport.cli; print([m for m in ('torch', 'numba', 'numpy', 'onnx', 'mlx') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_of_scales_passes_through_every_format(rule: str, tmp_path: Path) -> None:
    model = demo.make(tmp_path / "model", size="tiny", rule=rule)
    report = gemexport.export(model, tmp_path / "out", tokens=48)
    for item in report.artifacts:
        assert item.weights
        fractions = {tensor.exact_fraction for tensor in item.weights.tensors if len(tensor.shape) == 2}
        # 48 tokens are too few to hold one noise against another; what computes in f32 has no such excuse.
        broken = [bound.metric for bound in item.bounds if not bound.held and "int8" not in bound.metric]
        assert (item.format, item.variant, broken, fractions) == (item.format, item.variant, [], {1.0})
