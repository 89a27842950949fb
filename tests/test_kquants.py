"""K-quant files in whole runs: they load in llama.cpp, pass their validator, and fail it when something is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gemexport
from gemexport import demo
from gemexport.cli import main
from gemexport.formats.gguf.container import Writer, read
from gemexport.report.schema import ArtifactReport, read_report

COARSE = 50.0  # nats: what a few bits cost a random model, which is told and no fault


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 with rows of 64, 256 and 512 weights, on a lattice."""
    return demo.make(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    gemexport.export(model, out, formats=["gguf"], variants={"gguf": ("Q4_K_M", "Q6_K")}, tokens=200, max_kld=COARSE)
    return out


def _broken(report: ArtifactReport) -> list[str]:
    return [bound.metric for bound in report.bounds if not bound.held]


@pytest.mark.slow
def test_k_quants_pass_and_tell_what_they_cost(exported: Path) -> None:
    report = read_report(exported / "report.json")
    assert "libggml-python" in report.versions
    coarse, fine = report.artifacts
    for item in (coarse, fine):
        assert (item.status, _broken(item)) == ("pass", [])
        assert any("68 matrices left their lattice" in note for note in item.notes)
        assert item.weights
        assert item.logits
        assert item.logits.arithmetic == "int8-activations-256"
        assert [logits.arithmetic for logits in item.more_logits] == ["f32"]
        assert {tensor.requantized for tensor in item.weights.tensors} == {True, False}
        kept = [tensor for tensor in item.weights.tensors if not tensor.requantized]
        assert all(tensor.exact_fraction == 1 for tensor in kept)
    assert coarse.logits.loss.kld_mean > 2 * fine.logits.loss.kld_mean > 0
    assert 0.6 * fine.bytes < coarse.bytes < 0.9 * fine.bytes


@pytest.mark.slow
def test_two_matrices_that_changed_places_are_caught(exported: Path, model: Path, tmp_path: Path) -> None:
    """The file's numbers are run as they stand, so only the weights can tell."""
    source = read(exported / "gguf" / "demo-Q6_K.gguf")
    swapped = {"blk.0.attn_q.weight": "blk.1.attn_q.weight", "blk.1.attn_q.weight": "blk.0.attn_q.weight"}
    with Writer(tmp_path / "m.gguf", source.packed, {name: item.shape for name, item in source.tensors.items()}) as out:
        for name, item in source.tensors.items():
            taken = source.tensors[swapped.get(name, name)]
            out.write(name, item.type, np.array(source.rows(taken, 0, taken.nbytes // taken.row_bytes)))
    report = gemexport.validate(model, tmp_path / "m.gguf", tokens=64)
    assert report.status == "fail"
    assert "weights.rms_relative_error" in _broken(report)


def test_importances_that_cannot_be_used_are_refused_in_one_line(
    tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    useless = tmp_path / "i.dat"
    useless.write_bytes(b"no importances")
    for variant, reason in (("Q4_0", "is for K-quants"), ("Q6_K", "is no importance matrix")):
        arguments = ["gguf", str(tiny_gemma3), "--variant", variant, "--imatrix", str(useless), "--no-validate"]
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "-o", str(tmp_path / "out")])
        assert ended.value.code == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith(f"gemexport: {useless}: {reason}")
    assert not (tmp_path / "out").exists()
