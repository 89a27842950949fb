"""What a caller hears of a run while it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

import gemexport
from gemexport.report.console import Advance, _duration, _Lines, listening, watching
from gemexport.shared.node import Call, Events, Node, Outcome

NODE = Node("export gguf:Q4_0", Call("os:getpid", {}), total=100)


def tell(events: Events, outcome: Outcome) -> None:
    events.started(NODE)
    for amount in (30, 40, 50):
        events.advanced(NODE, amount)
    events.ended(NODE, outcome)


def test_a_listener_hears_how_far_each_step_is() -> None:
    heard: list[Advance] = []
    with listening(heard.append) as events:
        tell(events, Outcome(value=1, seconds=2.0))
    name = NODE.name
    assert heard[:-1] == [Advance(name, done, 100) for done in (0, 30, 70, 100)]
    assert heard[-1] == Advance(name, 100, 100, ended=True, seconds=2.0)


def test_a_listener_hears_why_a_step_ended() -> None:
    heard: list[Advance] = []
    with listening(heard.append) as events:
        events.started(NODE)
        events.ended(NODE, Outcome(failure="the process was killed", log=Path("x.log")))
        events.ended(Node("never ran", NODE.call), Outcome(failure="no", left_out=True))
    assert [(item.done, item.ended, item.reason) for item in heard[1:]] == [
        (0, True, "the process was killed; see x.log"), (0, True, "no"),
    ]  # fmt: skip


def test_nothing_is_shown_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with listening(None) as events:
        tell(events, Outcome(value=1))
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich this is a terminal
    with listening(None) as events:
        tell(events, Outcome(value=1))
    shown = capsys.readouterr()
    assert NODE.name in shown.err
    assert "100 %" in shown.err
    assert shown.out == ""


def test_the_command_line_prints_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with watching() as events:
        tell(events, Outcome(value=1, seconds=2.0))
    assert capsys.readouterr().err == f"{NODE.name}: done (2.0 s)\n"


def test_a_run_tells_its_steps_and_ends_when_nobody_wants_it(tiny_gemma3: Path, tmp_path: Path) -> None:
    heard: list[gemexport.Advance] = []
    gemexport.export(tiny_gemma3, tmp_path / "out", formats=["gguf"], validate=False, progress=heard.append)
    assert [item.step for item in heard if item.ended] == ["grids", "export gguf:Q4_0"]
    assert all(0 <= item.done <= item.total for item in heard)

    class EnoughError(Exception):
        pass

    def enough(item: gemexport.Advance) -> None:
        raise EnoughError

    with pytest.raises(EnoughError):
        gemexport.export(tiny_gemma3, tmp_path / "other", formats=["gguf"], validate=False, progress=enough)
    assert not (tmp_path / "other").exists()


def test_a_long_step_says_how_far_it_is_and_how_long_it_takes_still(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    events = _Lines(every=60, clock=lambda: now[0]).events()
    events.started(NODE)
    for seconds, amount in ((59, 5), (60, 5), (100, 10), (120, 30), (10_000, 40)):
        now[0] = seconds
        events.advanced(NODE, amount)
    events.ended(NODE, Outcome(value=1, seconds=2.0))
    assert capsys.readouterr().err.splitlines() == [
        f"{NODE.name}: 10%, about 9 min left",
        f"{NODE.name}: 50%, about 2 min left",
        f"{NODE.name}: 90%, about 19 min left",
        f"{NODE.name}: done (2.0 s)",
    ]
    assert [_duration(seconds) for seconds in (40, 5000, 50_000)] == ["40 s", "83 min", "13.9 h"]
