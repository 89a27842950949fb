"""Whole runs on a lone GGUF file: it takes the place of a checkpoint's folder in every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import gemexport
from gemexport.cli import main
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.storage.files import LOCK
from gemexport.report.schema import Report

pytest.importorskip("gguf")


def run(*arguments: str | Path) -> int:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def model(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Gemma 4 as a Q4_0 file and nothing else."""
    folder = tmp_path_factory.mktemp("gguf")
    report = gemexport.export(tiny_gemma4, folder / "out", formats=["gguf"], validate=False)
    path = folder / "lone.gguf"
    (folder / "out" / str(report.artifacts[0].path)).rename(path)
    return path


def export(model: Path, out: Path, *formats: str) -> Report:
    return gemexport.export(model, out, formats=list(formats), validate=False)


def test_a_file_goes_into_every_format(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export(model, out)
    assert {(item.format, item.status) for item in report.artifacts} == {
        (name, "written") for name in ("gguf", "mlx", "onnx", "coreml", "compressed-tensors")
    }
    assert all(item.path for item in report.artifacts), [item.reason for item in report.artifacts]
    assert (report.model.name, report.model.bytes) == ("lone", model.stat().st_size)
    assert (out / "gguf" / "lone-Q4_0.gguf").is_file()
    for folder in ("mlx/4bit", "compressed-tensors/w4a16"):
        assert (out / folder / "tokenizer.json").is_file()
        assert (out / folder / "chat_template.jinja").is_file()
    (unpacked,) = (path for path in (out / ".gemexport" / "source").iterdir() if path.name != LOCK)
    assert (unpacked / "tokenizer.json").is_file()


def test_a_lattice_is_the_same_out_of_a_file(model: Path, tiny_gemma4: Path, tmp_path: Path) -> None:
    """Q4_0 has the codes and scales that the lattice of the bf16 checkpoint has: MLX gets the same numbers."""
    from gemexport.formats import mlx
    from gemexport.validators.checks.weights import compare

    for name, source in (("folder", tiny_gemma4), ("file", model)):
        export(source, tmp_path / name, "mlx")
    first, second = (mlx.tensors(tmp_path / name / "mlx" / "4bit") for name in ("folder", "file"))
    judged = compare(first, second)
    assert (judged.missing, judged.unexpected) == ((), ())
    assert all(item.exact == item.compared for item in judged.tensors if len(item.shape) == 2)


def test_a_second_run_uses_what_was_unpacked(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(model, out, "mlx")
    (unpacked,) = (path for path in (out / ".gemexport" / "source").iterdir() if path.name != LOCK)
    before = (unpacked / "tokenizer.json").stat().st_mtime_ns
    (unpacked.parent / "0123-killed.partial").mkdir()
    export(model, out, "mlx")
    assert {path.name for path in unpacked.parent.iterdir()} == {unpacked.name, LOCK}
    assert (unpacked / "tokenizer.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["gguf", "mlx"])
def test_the_same_file_gives_the_same_bytes(name: str, model: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        export(model, tmp_path / folder, name)
    assert (tmp_path / "a" / "SHA256SUMS").read_text() == (tmp_path / "b" / "SHA256SUMS").read_text()


def test_plan_and_inspect_leave_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run("plan", model) == 0
    for folder in tmp_path.glob("gemexport-*"):  # of the tokenizer, until the process ends
        shutil.rmtree(folder)
    assert "artefacts go to lone-gemexport" in capsys.readouterr().out
    assert run("inspect", model, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["format"], facts["architecture"]) == ("lone", "GGUF", "gemma4")
    assert facts["grids"][0]["grid"] == "int4, blocks of 32, f16 scales"
    assert list(tmp_path.iterdir()) == []


def test_inspect_names_every_grid(mixed_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", mixed_gguf, "--json") == 0
    found = {row["grid"] for row in json.loads(capsys.readouterr().out)["grids"]}
    assert found >= {
        "int4, blocks of 32, f32 scales and biases",
        "int6, blocks of 16, f32 scales",
        "4-bit codebook, blocks of 32, bf16 scales",
        "int2, one scale a row, f16 scales",
    }


def test_inspect_tells_why_a_file_is_no_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gemexport.formats.gguf.container import Writer, read

    source, path = read(model), tmp_path / "part.gguf"
    kept = {name: item for name, item in source.tensors.items() if not name.startswith("blk.1.")}
    with Writer(path, source.packed, {name: item.shape for name, item in kept.items()}) as out:
        for name, item in kept.items():
            out.write(name, item.type, source.rows(item, 0, item.nbytes // item.row_bytes))
    assert run("inspect", path, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["as a model"].startswith("no: the tensor model.layers.1.")
    assert facts["artefact"] == "part.gguf"


def test_a_file_that_lies_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lies.gguf"
    path.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    assert run("all", path, "-o", tmp_path / "out") == 2
    assert "is not a whole GGUF file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_every_format_of_a_file_passes(model: Path, tmp_path: Path) -> None:
    report = gemexport.export(model, tmp_path / "out", tokens=200)
    for item in report.artifacts:
        assert (item.format, item.variant, item.status, item.reason) == (item.format, item.variant, "pass", None)
        assert item.weights
        assert all(tensor.exact_fraction == 1 for tensor in item.weights.tensors if len(tensor.shape) == 2)
        assert item.tokenizer is None or item.tokenizer.equal + item.tokenizer.runtime_only == item.tokenizer.texts


@pytest.mark.slow
def test_every_type_of_blocks_passes(mixed_gguf: Path, tmp_path: Path) -> None:
    """What a format cannot hold is rounded, and said; what it can hold is exact; and each runtime computes it right."""
    report = gemexport.export(mixed_gguf, tmp_path / "out", tokens=64)
    for item in report.artifacts:
        # 64 tokens are too few to hold one noise against another; what computes in f32 has no such excuse.
        broken = [str(bound) for bound in item.bounds if not bound.held and "int8" not in bound.metric]
        assert (item.format, item.variant, broken) == (item.format, item.variant, [])
    back = next(item for item in report.artifacts if item.format == "gguf")
    types = (
        {tensor.name: tensor.exact_fraction for tensor in back.weights.tensors if tensor.source_grid}
        if back.weights
        else {}
    )
    assert set(types.values()) == {1.0}, types


def test_the_checkpoint_of_a_file_has_no_folder(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    assert checkpoint.path == model
    assert checkpoint.plain_nbytes() > checkpoint.nbytes()
