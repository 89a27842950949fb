"""The command line itself: what cannot be read as one, help, completion, and a reader that has enough."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemexport import cli

GEMEXPORT = [sys.executable, "-P", "-m", "gemexport.cli"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--nope"], "No such option: --nope; see gemexport --help"),
        (["all"], "Missing argument 'MODEL'; see gemexport all --help"),
        (["inspect", "a", "b"], "Got unexpected extra argument(s) (b); see gemexport inspect --help"),
        (["alll", "model"], "No such command 'alll'. Did you mean 'all'?; see gemexport --help"),
        (["gguf", "model", "--variant"], "Option '--variant' requires an argument; see gemexport"),
        (["all", "model", "--jobs", "0"], "Invalid value for '--jobs': "),
        (["all", "model", "--tokens", "many"], "Invalid value for '--tokens': "),
        (["nosuch\x1b[2J"], "No such command 'nosuch\\x1b[2J'"),
    ],
)
def test_a_usage_error_is_one_line(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(given)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"gemexport: {said.partition(';')[0]}")
    assert shown.err.count("\n") == 1
    assert "--help" in shown.err


def test_a_format_is_a_command_in_letters_of_any_case(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("GGUF", "CoreML", "Compressed-Tensors"):
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "nowhere"])
        assert ended.value.code == 2
        assert "nowhere: there is no such file or folder" in capsys.readouterr().err


def test_no_command_at_all_is_helped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    shown = capsys.readouterr()
    assert (ended.value.code, shown.err) == (2, "")
    assert "compressed-tensors" in shown.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("gemexport comp", "compressed-tensors"),
        ("gemexport gguf --va", "--variant"),
        ("gemexport all --only gguf,m", "gguf,mlx"),
        ("gemexport gguf model --variant Q4_0,Q6", "Q4_0,Q6_K"),
        ("gemexport plan model --recipe los", "lossless"),
        ("gemexport all model --compress gp", "gptq"),
    ],
)
def test_shells_complete(words: str, expected: str) -> None:
    count = str(len(words.split()) - 1)
    environment = {**os.environ, "_GEMEXPORT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count}
    run = "import sys; sys.argv = ['gemexport']; from gemexport.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", run], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout.split(), done.stderr) == ([expected], "")


def test_a_reader_that_has_enough_hears_nothing(tmp_path: Path) -> None:
    """As `gemexport --help | head -1` has it."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run([*GEMEXPORT, "--help"], stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
