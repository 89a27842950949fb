"""A run whose steps fail: what is said, and what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gemexport
from gemexport import Advance, cli, validate
from gemexport.engine.dag import graph
from gemexport.engine.output import Owner, identity
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.shared.memory import anonymous_bytes, descendants
from gemexport.shared.node import Call, Node, Outcome, StepError


def test_the_log_that_a_message_points_to_is_kept(
    tiny_gemma3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without grids there is no run, and the output folder is new: it stays, with the log."""
    broken = [Node("grids", Call("gemexport.engine.steps:grids", {"no": "argument of its"}))]
    monkeypatch.setattr("gemexport.run.graph", lambda *_: broken)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        cli.main(["gguf", str(tiny_gemma3), "-o", str(out), "--no-validate", "--json"])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("gemexport: the step grids did not succeed: TypeError: ")
    assert said.count("\n") == 1
    log = Path(said.strip().partition("; see ")[2])
    assert log.parent == out / ".gemexport" / "logs"
    assert "Traceback" in log.read_text()


@pytest.mark.skipif(anonymous_bytes() is None, reason="the system does not tell which processes a step has")
def test_a_step_that_the_system_kills_says_so_in_the_report(tiny_gemma3: Path, tmp_path: Path) -> None:
    def kill(heard: Advance) -> None:
        if heard.step == "export gguf:Q4_0" and not heard.ended:
            for process in descendants(os.getpid()):
                os.kill(process, signal.SIGKILL)

    report = gemexport.export(tiny_gemma3, tmp_path / "out", formats=["gguf"], validate=False, jobs=1, progress=kill)
    (artifact,) = report.artifacts
    assert artifact.status == "error"
    cause, _, log = str(artifact.reason).partition("; see ")
    assert cause == "the process was killed; memory may be short"
    assert Path(log) == tmp_path / "out" / ".gemexport" / "logs" / "export gguf-Q4_0.log"
    assert Path(log).is_file()


def test_what_the_reference_does_not_touch_is_judged_without_it(
    tiny_gemma3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> list[Node]:
        call = Call("gemexport.engine.steps:reference", {"no": "argument of its"})
        return [replace(node, call=call) if node.name == "reference" else node for node in graph(*given)]

    monkeypatch.setattr("gemexport.run.graph", broken)
    report = gemexport.export(tiny_gemma3, tmp_path / "out", formats=["gguf"], jobs=1, tokens=80)
    (artifact,) = report.artifacts
    assert artifact.weights is not None
    assert artifact.weights.exact_fraction == 1
    assert artifact.tokenizer is not None
    assert artifact.chat is not None
    assert [(item.part, item.because) for item in artifact.unjudged] == [("logits", "crashed")]
    assert artifact.status == "error"
    cause, _, log = str(artifact.reason).partition("; see ")
    assert cause.startswith("logits not judged: the reference did not succeed: TypeError: ")
    assert "Traceback" in Path(log).read_text()


def test_what_judging_leaves_on_the_way_lies_beside_the_artefact(
    tiny_gemma3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as large as a model, and TMPDIR may be a disk in memory. A log that a message points to outlives it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "everybodys"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "everybodys").mkdir()
    places: list[Path] = []

    def broken(asked: object, checkpoint: object, work: Path, step: object) -> list[Node]:
        places.append(work)
        return [Node("grids", Call("gemexport.engine.steps:grids", {"no": "argument of its"}))]

    monkeypatch.setattr("gemexport.run.judgement", broken)
    artifact = tmp_path / "models" / "model.gguf"
    artifact.parent.mkdir()
    artifact.touch()
    with pytest.raises(StepError, match="the step grids did not succeed: TypeError") as caught:
        validate(tiny_gemma3, artifact)
    assert places[0].parent == artifact.parent
    assert list(artifact.parent.iterdir()) == [artifact]
    log = Path(str(caught.value).partition("; see ")[2])
    assert list((tmp_path / "everybodys").iterdir()) == [log]
    assert "Traceback" in log.read_text()


TERMINATED = """
import os, signal, sys
from gemexport import cli
from gemexport.report import console
from gemexport.shared.memory import descendants

console._line = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
try:
    cli.main(sys.argv[1:])
finally:
    print(len(list(descendants(os.getpid()))), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""


def test_sigterm_ends_a_run_as_ctrl_c_does(tiny_gemma3: Path, tmp_path: Path) -> None:
    """Batch systems and `timeout` send it: the message, a signal's status, no process and nothing half written stay.

    In a process of its own, which a signal that nobody handles would end.
    """
    command = [sys.executable, "-P", "-c", TERMINATED, "gguf", str(tiny_gemma3), "--no-validate"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out")], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (143, "gemexport: interrupted\n")
    assert done.stdout == "0 True\n"
    assert not list(tmp_path.iterdir())


def _gone(group: int) -> bool:
    """Whether no process of the group is left: what a step started ends as soon as it sees that the step is gone."""
    for _ in range(1000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("seen", "kept"), [("grids.partial", []), ("logs/export*", []), ("logs/validate*", ["tiny-gemma3-Q4_0.gguf"])]
)
def test_sigterm_in_the_middle_of_a_step_leaves_what_is_whole(
    seen: str, kept: list[str], tiny_gemma3: Path, tmp_path: Path
) -> None:
    """Sent when a step's traces are `seen` in the work folder: grids, an export, and a validator.

    An export of a model so small may be done before the signal is there; then its file is whole, and kept.
    """
    out = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "gemexport.cli", "gguf", str(tiny_gemma3), "-o", str(out)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True)
    while run.poll() is None and not list((out / ".gemexport").glob(seen)):
        time.sleep(0.001)
    run.terminate()
    _, said = run.communicate(timeout=120)
    assert (run.returncode, said.splitlines()[-1]) == (143, "gemexport: interrupted")
    assert _gone(run.pid)
    left = [path.name for path in out.rglob("*.gguf*")]
    assert left in (kept, ["tiny-gemma3-Q4_0.gguf"])
    assert not [path for path in out.rglob("*.partial") if path.parent.name != ".gemexport"]
    assert out.exists() == bool(left)


@pytest.mark.parametrize("existed", [False, True])
def test_ctrl_c_keeps_the_artefacts_that_are_whole_and_names_them(
    existed: bool,
    tiny_gemma3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Hours of work went with the one artefact that was not finished."""
    out = tmp_path / "deep" / "out"
    whole, other = out / "gguf" / "tiny-gemma3-Q8_0.gguf", out / "gguf" / "tiny-gemma3-Q4_0.gguf"
    if existed:
        other.parent.mkdir(parents=True)
        (out / ".gemexport").mkdir()
        owner = Owner(name="tiny-gemma3", identity=identity(open_checkpoint(tiny_gemma3)))
        (out / ".gemexport" / "model.json").write_text(owner.model_dump_json())
        other.write_text("of an earlier run")

    def interrupt(node: Node, outcome: Outcome) -> None:
        if node.name == "export gguf:Q8_0":
            other.with_name(f"{other.name}.partial").write_text("as far as a process came")
            raise KeyboardInterrupt

    monkeypatch.setattr("gemexport.report.console._line", interrupt)
    monkeypatch.setattr(
        "gemexport.run.graph", lambda *given: [node for node in graph(*given) if "Q4_0" not in node.name]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main(["gguf", str(tiny_gemma3), "-o", str(out), "--variant", "Q4_0,Q8_0", "--no-validate"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"whole, and kept: {whole}\ngemexport: interrupted\n"
    assert sorted(out.glob("gguf/*")) == [*([other] if existed else []), whole]
    assert (whole.read_bytes()[:4], not existed or other.read_text()) == (b"GGUF", not existed or "of an earlier run")


def test_a_disk_that_has_no_room_for_the_report_keeps_the_artefacts(
    tiny_gemma3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, _: str) -> None:
        raise InputError(path, "the disk is full", "free some space")

    monkeypatch.setattr("gemexport.report.render.write_text", full)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        cli.main(["gguf", str(tiny_gemma3), "-o", str(out), "--no-validate"])
    assert ended.value.code == 2
    named, said = capsys.readouterr().err.splitlines()[-2:]
    assert named == f"whole, and kept: {out / 'gguf' / 'tiny-gemma3-Q4_0.gguf'}"
    assert said == f"gemexport: {out / 'report.json'}: the disk is full; free some space"
    assert [path.name for path in out.glob("gguf/*")] == ["tiny-gemma3-Q4_0.gguf"]
