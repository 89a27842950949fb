"""Cases after public reports that no other test has: where a model and its output lie, and what limits a run."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import gemexport
from gemexport.cli import main
from gemexport.formats.checkpoint import open_checkpoint


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a command prints before it ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gemexport: ")]
    return line


def test_a_file_in_the_hubs_cache_has_the_name_that_its_repository_gave_it(tiny_gemma3: Path, tmp_path: Path) -> None:
    """It was called by the hash of its bytes, and so were the artefacts."""
    made = gemexport.export(tiny_gemma3, tmp_path / "out", formats=["gguf"], validate=False)
    repository = tmp_path / "models--google--gemma-x"
    blob, link = repository / "blobs" / ("ab" * 32), repository / "snapshots" / ("cd" * 20) / "gemma-x-q4_0.gguf"
    blob.parent.mkdir(parents=True)
    link.parent.mkdir(parents=True)
    (row,) = made.artifacts
    shutil.copyfile(tmp_path / "out" / str(row.path), blob)
    link.symlink_to(blob)
    assert open_checkpoint(link).name == "gemma-x-q4_0"
    (tmp_path / "mine").symlink_to(tiny_gemma3)
    assert open_checkpoint(tmp_path / "mine").name == "mine"


def test_a_folder_has_its_name_when_it_is_given_as_a_dot(tiny_gemma3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_gemma3)
    assert open_checkpoint(Path()).name == tiny_gemma3.name


def test_no_note_names_a_place_of_this_machine(tiny_gemma3: Path, tmp_path: Path) -> None:
    """Notes are published; files are named by where they lie in the folder."""
    out = tmp_path / "out"
    report = gemexport.export(tiny_gemma3, out, formats=["gguf", "mlx"], validate=False)
    notes = [*report.model.notes, *(note for row in report.artifacts for note in row.notes)]
    assert notes
    assert not [note for note in notes if str(tmp_path) in note or str(tiny_gemma3) in note]
    assert not [file.path for row in report.artifacts for file in row.files if file.path.startswith(("/", ".."))]
    assert str(out) not in (out / "SHA256SUMS").read_text("utf-8")


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def file(path: Path) -> None:
    path.write_text("a file")


@pytest.mark.parametrize("make", [dangling, file])
def test_a_place_that_is_no_folder(
    make: Callable[[Path], None], tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "out")
    line = complaint(capsys, "gguf", tiny_gemma3, "-o", tmp_path / "out", "--no-validate")
    assert "choose another folder with -o" in line
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_socket_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may have a hundred characters
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("model")
        assert "is a socket and should be a file" in complaint(capsys, "plan", "model")


def test_a_file_may_be_no_larger(tiny_gemma3: Path, tmp_path: Path) -> None:
    """`ulimit -f`, under which a write ends a process by a signal, unless that is told otherwise."""
    command = ["gguf", str(tiny_gemma3), "-o", str(tmp_path / "out"), "--no-validate"]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 200 && exec "$@"', "sh", sys.executable, "-m", "gemexport.cli", *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gemexport: ")]
    assert done.returncode == 2
    assert "is larger than a file may be here; see `ulimit -f`" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", ["(x+x+)+y", "(a|a)*$", "(.*)*Z", "^(([a-z_])+.)+[0-9]$"])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_of_an_adapter_end(key: str, pattern: str, golden: Path, tiny_gemma3: Path, tmp_path: Path) -> None:
    """Each is looked for in the names of all modules, and tried in all ways would take for ever."""
    folder = Path(shutil.copytree(golden / "adapters" / "rslora", tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    given = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**given, key: {pattern: given["r"]}}), "utf-8")
    assert open_checkpoint(tiny_gemma3, adapter=folder).bases


def test_gemma3_with_all_its_parts_and_no_decoder(
    tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`'gemma3' is not known; use one of these: gemma3, …` was what it said."""
    model = Path(shutil.copytree(tiny_gemma3, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text('{"model_type": "gemma3"}')
    assert "has no text_config for the decoder" in complaint(capsys, "plan", model)
    (model / "config.json").write_text(json.dumps({**config, "model_type": "gemma3"}))
    assert open_checkpoint(model).model == open_checkpoint(tiny_gemma3).model
