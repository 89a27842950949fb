"""`validate` opens an artefact before it computes anything, and writes its report where it is told."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import gemexport
from gemexport import Advance, cli, validate
from gemexport.formats.storage.errors import InputError

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("mlx_lm")


@pytest.fixture(scope="module")
def written(tiny_gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("opening") / "out"
    gemexport.export(tiny_gemma3, out, formats=["gguf", "mlx"], validate=False)
    return out


@pytest.fixture(scope="module")
def artifact(written: Path) -> Path:
    return next(written.glob("gguf/*.gguf"))


def refused(model: Path, artifact: Path, out: Path) -> tuple[InputError, set[str]]:
    """Why an artefact is refused, and the steps that ran until then."""
    heard: list[Advance] = []
    with pytest.raises(InputError) as caught:
        validate(model, artifact, out=out, progress=heard.append)
    assert not out.exists()
    return caught.value, {item.step.split()[0] for item in heard if not item.ended}


def test_a_truncated_file_and_another_models_are_told_before_anything_is_computed(
    tiny_gemma3: Path, tiny_gemma4: Path, artifact: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(artifact.read_bytes()[:-1000])
    error, ran = refused(tiny_gemma3, cut, tmp_path / "out")
    assert error.path == str(cut)
    assert ran == {"open"}

    other = tmp_path / "other.gguf"
    shutil.copyfile(artifact, other)
    error, ran = refused(tiny_gemma4, other, tmp_path / "out")
    assert error.problem.startswith("is another model's: it has ")
    assert error.remedy == "give the checkpoint that it was made from"
    assert ran == {"open"}


@pytest.mark.slow
def test_the_report_lies_where_it_is_told_beside_what_is_there(
    tiny_gemma3: Path, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, artifact = tmp_path / "reports", written / "mlx" / "4bit"
    for path in (artifact, shutil.copytree(artifact, tmp_path / "again")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["validate", str(tiny_gemma3), str(path), "-o", str(out), "--tokens", "24"])
        assert ended.value.code == 0, capsys.readouterr()
    report = json.loads((out / "report.json").read_text())
    assert [(row["variant"], row["status"]) for row in report["artifacts"]] == [
        ("4bit", "pass"), ("again", "pass"),
    ]  # fmt: skip
    assert [(out / row["path"]).resolve() for row in report["artifacts"]] == [artifact, tmp_path / "again"]
    assert {"report.html", "report.md", "report.junit.xml", "SHA256SUMS"} <= {file.name for file in out.iterdir()}
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, check=True, capture_output=True)


def test_a_folder_that_is_somebody_elses_gets_no_report(tiny_gemma3: Path, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(InputError, match="is not empty and not an output folder"):
        validate(tiny_gemma3, artifact, out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]
