"""A LoRA adapter beside a checkpoint, from the command line and from Python: what is exported, said and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import gemexport
from gemexport import demo
from gemexport.cli import main
from gemexport.formats import gguf, lora
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.storage.safetensors import read_file


@pytest.fixture
def adapter(golden: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(golden / "lora", tmp_path / "adapter"))


def configure(adapter: Path, **changes: object) -> None:
    path = adapter / lora.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def run(*arguments: str | Path) -> object:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return ended.value.code


def test_merged_weights_are_exported_and_the_report_says_what_left_the_lattice(
    golden: Path, tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, adapter = tmp_path / "out", golden / "lora"
    command = ("gguf", tiny_gemma3, "--adapter", adapter, "-o", out, "--variant", "Q4_0,F32", "--no-validate")
    assert run(*command) == 0
    assert "the merge left the lattice: 5 matrices" in capsys.readouterr().out.replace("\n", " ")
    name = f"{tiny_gemma3.name}-lora"
    merged = open_checkpoint(tiny_gemma3, adapter=adapter)
    for tensor, stored in gguf.tensors(out / "gguf" / f"{name}-F32.gguf").items():
        np.testing.assert_array_equal(stored.numpy(), merged.tensors[tensor].numpy())
    report = json.loads((out / "report.json").read_text())["model"]
    changed = set(read_file(golden / "lora" / "merged.safetensors"))
    assert report["name"] == name
    assert report["adapter"] == str(adapter)
    assert {tensor["name"] for tensor in report["lattice"]["tensors"] if tensor["left"]} == changed
    assert "model.layers.*.self_attn.q_proj.weight (2)" in report["notes"][-1]
    assert "the recipe default quantized them anew" in report["notes"][-1]
    for file in ("report.html", "report.md"):
        assert "the merge left the lattice" in (out / file).read_text()


def test_output_of_another_adapter_is_another_models(
    tiny_gemma3: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def export(*more: str | Path) -> object:
        return run("gguf", tiny_gemma3, "-o", out, "--no-validate", *more)

    assert export("--adapter", adapter) == 0
    marks = {path: path.stat().st_mtime_ns for path in (out / ".gemexport" / "grids").iterdir()}
    assert export("--adapter", adapter) == 0
    assert {path: path.stat().st_mtime_ns for path in marks} == marks  # the grids of the first run
    capsys.readouterr()
    assert export() == 2
    assert "holds the artefacts of another model" in capsys.readouterr().err
    configure(adapter, lora_alpha=15)
    assert export("--adapter", adapter) == 2
    assert "holds the artefacts of another model" in capsys.readouterr().err


@pytest.mark.slow
def test_validate_takes_an_adapter(golden: Path, tiny_gemma3: Path, tmp_path: Path) -> None:
    adapter = golden / "lora"
    assert run("gguf", tiny_gemma3, "--adapter", adapter, "-o", tmp_path / "out", "--variant", "F32",
               "--no-validate") == 0  # fmt: skip
    artifact = next((tmp_path / "out" / "gguf").iterdir())
    memory = 1 << 20  # not enough for the reference: weights and tokenizer only
    right = gemexport.validate(tiny_gemma3, artifact, adapter=adapter, memory=memory)
    wrong = gemexport.validate(tiny_gemma3, artifact, memory=memory)
    assert (right.status, [item.part for item in right.unjudged]) == ("partial", ["logits"])
    assert wrong.status == "fail"


def test_inspect_and_plan_take_an_adapter(golden: Path, tiny_gemma3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = golden / "lora"
    assert run("inspect", tiny_gemma3, "--adapter", adapter, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"grid": "f32", "tensors": 5, "weights": 53248} in facts["grids"]
    assert run("plan", tiny_gemma3, "--adapter", adapter, "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"]


@pytest.mark.slow
def test_merged_model_against_the_reference_with_the_merged_weights(
    golden: Path, tiny_gemma3: Path, tmp_path: Path
) -> None:
    """The reference holds what was merged: an artefact in f32 is 1e-5 nats from it, and the base is not."""
    out, variants = tmp_path / "out", {"gguf": ("F32",), "onnx": ("f32",)}
    report = gemexport.export(
        tiny_gemma3, out, formats=["gguf", "onnx"], variants=variants, adapter=golden / "lora", tokens=128
    )
    assert [artifact.status for artifact in report.artifacts] == ["pass", "pass"]
    base = gemexport.validate(tiny_gemma3, out / "onnx" / "f32", tokens=128)
    assert base.status == "fail"
    assert base.logits is not None
    assert base.logits.loss is not None
    assert base.logits.loss.kld_mean > 0.01


DAMAGES = {
    "another rank": ({"r": 8}, "where adapter_config.json says 8"),
    "DoRA": ({"use_dora": True}, "is an embedding with use_dora, which cannot be merged here"),
    "another method": ({"peft_type": "IA3"}, "the adapter is a IA3, not a LORA"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["all", "gguf", "plan", "inspect"])
def test_adapters_that_cannot_be_merged(
    damage: str, command: str, tiny_gemma3: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, problem = DAMAGES[damage]
    configure(adapter, **changes)
    out = [] if command == "inspect" else ["-o", tmp_path / "out"]
    assert run(command, tiny_gemma3, "--adapter", adapter, *out) == 2
    captured = capsys.readouterr()
    assert problem in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_adapters_of_another_base(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = demo.make(tmp_path / "other", family="gemma3", size=demo.Size(512, 32, 32, 1, 1, 32, 32, 8))
    assert run("all", other, "--adapter", golden / "lora", "-o", tmp_path / "out") == 2
    line = capsys.readouterr().err
    assert line.startswith("gemexport: ")
    assert "the base has [" in line
    assert line.endswith("give the base that the adapter was made for\n")
    assert not (tmp_path / "out").exists()
    assert run("inspect", other, "--adapter", tmp_path / "nowhere") == 2
    assert "nowhere: there is no such folder; give the folder of a LoRA adapter of peft" in capsys.readouterr().err
