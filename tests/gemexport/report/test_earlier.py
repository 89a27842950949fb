"""Rows of earlier runs: which stand, which claim nothing any more, and what a run that is killed leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gemexport
from gemexport import Advance, InputError, demo
from gemexport.report.checksums import file_sha256
from gemexport.report.schema import Report, read_report

KILLED = """
import os, signal, sys
import gemexport

def heard(advance):
    if advance.step.startswith("export") and not advance.ended:
        os.kill(os.getpid(), signal.SIGKILL)

gemexport.export(sys.argv[1], sys.argv[2], formats=["gguf"], validate=False, progress=heard)
"""


def export(model: Path, out: Path, *formats: str, **options: Any) -> Report:
    return gemexport.export(model, out, formats=formats, validate=False, **options)


def status(report: Report) -> dict[str, tuple[str, bool]]:
    """By artefact: its reason (nothing was judged here), and whether it is of an earlier run."""
    return {f"{row.format} {row.variant}": (str(row.reason), row.earlier is not None) for row in report.artifacts}


def sums(out: Path) -> dict[str, str]:
    lines = (out / "SHA256SUMS").read_text().splitlines()
    return {path: digest for digest, path in (line.split("  ", 1) for line in lines)}


PLAIN = "not validated (--no-validate)"


def test_a_second_command_adds_its_rows(tiny_gemma3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(tiny_gemma3, out, "mlx", recipe="int8")
    both = export(tiny_gemma3, out, "gguf")
    assert status(both) == {"gguf Q4_0": (PLAIN, False), "mlx 4bit": (PLAIN, True)}
    assert both == read_report(out / "report.json")
    earlier = both.artifacts[1].earlier
    assert earlier is not None
    assert (both.recipe, earlier.recipe) == ("default", "int8")
    assert sums(out) == {
        file.relative_to(out).as_posix(): file_sha256(file)
        for folder in ("gguf", "mlx")
        for file in (out / folder).rglob("*")
        if file.is_file()
    }
    for view in ("report.html", "report.md"):
        assert "an earlier run, recipe int8" in (out / view).read_text()
    assert "mlx" in (out / "report.junit.xml").read_text()
    # Its own row a run replaces.
    assert status(export(tiny_gemma3, out, "mlx")) == {"gguf Q4_0": (PLAIN, True), "mlx 4bit": (PLAIN, False)}


def test_rows_stand_as_long_as_their_bytes_do(tiny_gemma3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(tiny_gemma3, out, "gguf", variants={"gguf": ["Q4_0", "Q8_0", "BF16"]})
    changed = out / "gguf" / "tiny-gemma3-Q8_0.gguf"
    with changed.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    (out / "gguf" / "tiny-gemma3-BF16.gguf").unlink()
    report = export(tiny_gemma3, out, "mlx")
    assert status(report) == {
        "gguf Q4_0": (PLAIN, True),
        "gguf Q8_0": ("what lies there is not what was judged", False),
        "mlx 4bit": (PLAIN, False),
    }
    assert {path for path in sums(out) if path.startswith("gguf")} == {"gguf/tiny-gemma3-Q4_0.gguf"}


def test_rows_of_a_model_that_was_trained_on_claim_nothing(tmp_path: Path) -> None:
    model, out = demo.make(tmp_path / "model", family="gemma3", size="tiny"), tmp_path / "out"
    export(model, out, "gguf")
    os.utime(model / "model.safetensors", (1, 1))
    report = export(model, out, "mlx")
    old, new = report.artifacts
    assert (old.status, old.reason) == ("skipped", "was made of model as its files were before; write it anew")
    assert new.reason == PLAIN
    assert all(path.startswith("mlx/") for path in sums(out))


@pytest.mark.parametrize("retrained", [False, True])
def test_a_run_that_is_killed_leaves_no_row_of_what_it_was_to_replace(retrained: bool, tmp_path: Path) -> None:
    model, out = demo.make(tmp_path / "model", family="gemma3", size="tiny"), tmp_path / "out"
    export(model, out, "gguf", "mlx")
    if retrained:
        os.utime(model / "model.safetensors", (1, 1))
    killed = subprocess.run([sys.executable, "-P", "-c", KILLED, str(model), str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    gguf, mlx = read_report(out / "report.json").artifacts
    assert (gguf.status, gguf.sha256) == ("skipped", None)
    assert "did not end" in str(gguf.reason)
    assert (mlx.sha256 is None) == retrained
    assert any(path.startswith("mlx/") for path in sums(out)) != retrained
    assert not any(path.startswith("gguf/") for path in sums(out))
    for view in ("report.html", "report.md", "report.junit.xml"):
        assert "did not end" in (out / view).read_text()


def test_what_a_run_that_failed_did_not_touch_comes_back(tiny_gemma3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(tiny_gemma3, out, "gguf", variants={"gguf": ["Q4_0", "Q8_0"]})
    before = sums(out)

    def stop(heard: Advance) -> None:
        if heard.step == "grids" and heard.ended:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tiny_gemma3, out, "gguf", progress=stop, variants={"gguf": ["Q4_0", "Q8_0"]})
    assert sums(out) == before
    assert [row.reason for row in read_report(out / "report.json").artifacts] == [PLAIN] * 2


@pytest.mark.parametrize("damage", ["{", '{"schema_version": 1}', None])
def test_a_report_that_cannot_be_read_proves_nothing(damage: str | None, tiny_gemma3: Path, tmp_path: Path) -> None:
    """What was written with it goes, before anything is replaced."""
    out = tmp_path / "out"
    export(tiny_gemma3, out, "gguf")
    if damage is None:
        (out / "report.json").unlink()
    else:
        (out / "report.json").write_text(damage)

    def look(heard: Advance) -> None:
        assert not [path for path in out.iterdir() if path.name.startswith(("report", "SHA"))]

    report = export(tiny_gemma3, out, "mlx", progress=look)
    assert status(report) == {"mlx 4bit": (PLAIN, False)}


def test_fresh_has_the_folder_of_another_model(tiny_gemma3: Path, tmp_path: Path) -> None:
    """That of an older version is one too. What lies there stays, and is named."""
    other, out = demo.make(tmp_path / "other", family="gemma3", size="tiny"), tmp_path / "out"
    export(other, out, "gguf")
    with pytest.raises(InputError, match=r"another model \(other\); choose another folder .* --fresh"):
        export(tiny_gemma3, out, "gguf")
    report = export(tiny_gemma3, out, "gguf", fresh=True)
    assert status(report) == {"gguf Q4_0": (PLAIN, False)}
    assert report.model.notes[0] == (
        "the output folder was another model's until now (other); still there, and in no report: gguf/other-Q4_0.gguf"
    )
    assert sums(out).keys() == {"gguf/tiny-gemma3-Q4_0.gguf"}
    assert json.loads((out / ".gemexport" / "model.json").read_text())["name"] == "tiny-gemma3"


def test_what_a_killed_run_left_of_its_reference_is_nobodys(tiny_gemma3: Path, tmp_path: Path) -> None:
    """It may be of weights that were trained on since."""
    out = tmp_path / "out"
    export(tiny_gemma3, out, "gguf")
    left = out / ".gemexport" / "reference" / "source" / "logits.npy"
    left.parent.mkdir(parents=True)
    left.touch()

    def look(heard: Advance) -> None:
        assert not left.exists()

    export(tiny_gemma3, out, "gguf", progress=look)


def test_what_killed_runs_left_goes_and_what_they_had_put_aside_is_back(tiny_gemma3: Path, tmp_path: Path) -> None:
    """Of formats that this run does not write, too. A folder is replaced in two renames: a run may end between them."""
    out = tmp_path / "out"
    export(tiny_gemma3, out, "mlx")
    before = sums(out)
    os.replace(out / "mlx" / "4bit", out / "mlx" / "4bit.old.partial")
    (out / "mlx" / "4bit.partial").mkdir()
    (out / "mlx" / "4bit.partial" / "model.safetensors").write_bytes(bytes(1000))
    (out / "report.html.partial").touch()
    report = export(tiny_gemma3, out, "gguf")
    assert status(report)["mlx 4bit"] == (PLAIN, True)
    assert before.items() <= sums(out).items()
    assert not list(out.rglob("*.partial"))


def test_a_run_that_was_killed_before_it_had_a_name_is_nobodys(tiny_gemma3: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / ".gemexport").mkdir(parents=True)
    (tmp_path / "out" / ".gemexport" / "lock").touch()
    assert export(tiny_gemma3, tmp_path / "out", "gguf").artifacts[0].path is not None
