"""Runs with `--ple-codec`: the same codes in every format that holds them, and a note in the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gemexport
from gemexport.cli import main
from gemexport.engine.dag import graph
from gemexport.formats import coreml, onnx
from gemexport.formats.gemma.names import PER_LAYER_EMBEDDING as NAME
from gemexport.formats.grids.recipe import RECIPES
from gemexport.judge.verdict import bounds
from gemexport.report.schema import Report, read_report
from gemexport.request import request, steps
from gemexport.shared.measured import TensorReport, Validation, WeightsReport

COARSE = 50.0  # nats: what a few bits cost a random model, which is told and no fault


def coded(**fields: float | None) -> Validation:
    tensor = TensorReport(
        name=NAME, shape=(4, 8), dtype="f32", compared=32, exact=0, exact_fraction=0, max_relative_error=0.5,
        requantized=True, codec="aqlm:2x8:8", **fields,
    )  # fmt: skip
    return Validation(WeightsReport(compared=32, exact=0, exact_fraction=0, max_relative_error=0.5, tensors=(tensor,)))


@pytest.mark.parametrize(
    ("rms", "fitted", "passes"),
    [(0.31, 0.31, True), (0.31 * (1 + 1e-8), 0.31, False), (0.9, 0.9, True), (float("nan"), 0.31, False)],
)
def test_the_error_of_a_codec_is_the_one_that_its_fit_measured(rms: float, fitted: float, passes: bool) -> None:
    found = coded(rms_relative_error=rms, fitted_rms=fitted)
    assert all(bound.held for bound in bounds(found, {}, RECIPES["default"])) is passes


def test_a_codec_of_unknown_error_is_held_to_the_bound_of_requantized_matrices() -> None:
    assert all(bound.held for bound in bounds(coded(rms_relative_error=0.5), {}, RECIPES["default"]))
    assert not all(bound.held for bound in bounds(coded(rms_relative_error=1.4), {}, RECIPES["default"]))


def status(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return int(ended.value.code or 0)


def test_what_cannot_be_done_is_one_line(
    tiny_gemma3: Path, tiny_gemma4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, codec, said in (
        (tiny_gemma3, "aqlm:2x8", "no per-layer embeddings"),
        (tiny_gemma4, "aqlm:2x8:24", "do not divide"),
        (tiny_gemma4, "opq:2x8", "no vector codec"),
        (tiny_gemma4, "aqlm:2x16", "out of range"),
        (tiny_gemma4, "aqlm:2x8,aqlm:2x8:8", "twice"),
    ):
        assert status("all", model, "-o", tmp_path / "out", "--ple-codec", codec) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_each_codec_of_a_list_is_an_artefact_and_is_fitted_once(tiny_gemma4: Path, tmp_path: Path) -> None:
    asked = request(
        model=tiny_gemma4, out=tmp_path / "out", formats=["mlx", "onnx", "coreml"],
        ple_codec="none, aqlm:1x8,aqlm:2x8:4", validate=False,
    )  # fmt: skip
    checkpoint = asked.checkpoint()
    wanted = steps(asked, checkpoint)
    assert [(step.label, step.path.relative_to(tmp_path / "out").as_posix()) for step in wanted] == [
        ("4bit", "mlx/4bit"),
        ("int4", "onnx/int4"),
        ("int4-aqlm-1x8", "onnx/int4-aqlm-1x8"),
        ("int4-aqlm-2x8-4", "onnx/int4-aqlm-2x8-4"),
        ("npu", "onnx/npu"),
        ("npu-aqlm-1x8", "onnx/npu-aqlm-1x8"),
        ("npu-aqlm-2x8-4", "onnx/npu-aqlm-2x8-4"),
        ("int4", "coreml/int4.mlpackage"),
        ("int4-aqlm-1x8", "coreml/int4-aqlm-1x8.mlpackage"),
        ("int4-aqlm-2x8-4", "coreml/int4-aqlm-2x8-4.mlpackage"),
    ]
    nodes = {node.name: node for node in graph(asked, checkpoint, tmp_path / "work", wanted)}
    assert [name for name in nodes if name.startswith("codec")] == ["codec aqlm:1x8:8", "codec aqlm:2x8:4"]
    assert nodes["export onnx:npu-aqlm-1x8"].needs == ("round", "codec aqlm:1x8:8")
    assert nodes["export onnx:npu"].needs == ("round",)
    folders = {node.call.arguments["place"].vectors for name, node in nodes.items() if name.startswith("codec")}
    assert len(folders) == 2


@pytest.fixture(scope="module")
def report(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("runs") / "out"
    formats = ["mlx", "onnx", "coreml"]
    return gemexport.export(tiny_gemma4, out, formats=formats, tokens=100, ple_codec="aqlm:2x8", max_kld=COARSE), out


@pytest.mark.slow
def test_onnx_and_core_ml_pass_with_the_same_codes(report: tuple[Report, Path]) -> None:
    made, out = report
    found = {(item.format, item.variant): item for item in made.artifacts}
    assert {key: (item.status, item.reason) for key, item in found.items()} == {
        ("mlx", "4bit"): ("pass", None),
        ("onnx", "int4-aqlm-2x8"): ("pass", None),
        ("onnx", "npu-aqlm-2x8"): ("pass", None),
        ("coreml", "int4-aqlm-2x8"): ("pass", None),
    }
    assert any("nothing that holds a vector codec (aqlm:2x8:8)" in note for note in found["mlx", "4bit"].notes)
    read = {
        "int4": onnx.tensors(out / "onnx" / "int4-aqlm-2x8")[NAME],
        "npu": onnx.tensors(out / "onnx" / "npu-aqlm-2x8")[NAME],
        "coreml": coreml.tensors(out / "coreml" / "int4-aqlm-2x8.mlpackage")[NAME],
    }
    first = read["int4"].rows(0, read["int4"].shape[0])
    for name, tensor in read.items():
        assert tensor.grid == read["int4"].grid, name
        rows = tensor.rows(0, tensor.shape[0])
        assert rows.codes is not None
        assert np.array_equal(rows.codes, first.codes), name
        assert np.array_equal(rows.values, first.values), name
    for key, item in found.items():
        assert item.weights
        assert item.logits
        assert item.logits.conversion
        assert item.logits.loss
        for tensor in item.weights.tensors:
            in_codec = tensor.name == NAME and key[0] != "mlx"
            assert tensor.codec == ("aqlm:2x8:8" if in_codec else None)
            assert in_codec or len(tensor.shape) < 2 or tensor.exact_fraction == 1
        if key[0] != "mlx":
            assert item.logits.loss.kld_mean > 100 * item.logits.conversion.kld_mean
            assert any(note.startswith(f"{NAME} is in the vector codec") for note in item.notes)
            (coded_tensor,) = (tensor for tensor in item.weights.tensors if tensor.name == NAME)
            assert coded_tensor.kept == coded_tensor.compared, "the codes and codebooks of the fit, to the bit"
    assert read_report(out / "report.json") == made


@pytest.mark.slow
def test_an_artefact_with_a_codec_is_validated_by_itself(report: tuple[Report, Path], tiny_gemma4: Path) -> None:
    out = report[1]
    judged = gemexport.validate(tiny_gemma4, out / "coreml" / "int4-aqlm-2x8.mlpackage", tokens=60, max_kld=COARSE)
    assert (judged.status, judged.reason) == ("pass", None)
    # One code of the table, changed in the file.
    folder = out / "onnx" / "int4-aqlm-2x8"
    file = folder / "model.onnx.data"
    codes = onnx.tensors(folder)[NAME].rows(100, 101).codes
    assert codes is not None
    data = bytearray(file.read_bytes())
    place = data.find(codes.tobytes())
    assert place >= 0
    data[place] ^= 1
    file.write_bytes(bytes(data))
    judged = gemexport.validate(tiny_gemma4, folder, tokens=60, max_kld=COARSE)
    assert judged.status == "fail"
    assert "aqlm:2x8:8" in (judged.reason or "")
