"""The DAG's scheduler: order, failures that stay local, memory, crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gemexport.engine.processes import prepared
from gemexport.engine.scheduler import Events, Node, Scheduler, succeeded
from gemexport.engine.worker import Call
from gemexport.formats.storage.errors import InputError

Progress = Callable[[int], None]
HERE = f"{__name__}:"


def work(value: int, progress: Progress, seconds: float = 0.0) -> int:
    progress(1)
    time.sleep(seconds)
    return value


def stamp(path: Path, progress: Progress) -> None:
    """Write down when this ran."""
    started = time.monotonic()
    time.sleep(0.3)
    path.write_text(f"{started} {time.monotonic()}")


def which(progress: Progress) -> int:
    return os.getpid()


def fail(progress: Progress) -> None:
    raise ZeroDivisionError("by nought")


def complain(progress: Progress) -> None:
    raise InputError("model", "is broken", "mend it")


def crash(progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def linger(path: Path, progress: Progress) -> None:
    """Write down which process this is, and stay."""
    part = path.with_suffix(".part")
    part.write_text(str(os.getpid()))
    part.rename(path)
    time.sleep(60)


def alive(pid: int) -> bool:
    """Whether a process still runs; one that only waits to be reaped does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.is_file() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def swallow_memory(progress: Progress) -> int:
    taken = bytearray(200 << 20)
    time.sleep(0.2)
    return len(taken)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes import this very module."""
    # An empty entry would be the current folder, and in a clone the package that is not installed.
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))


def call(name: str, **arguments: object) -> Call:
    return Call(f"test_scheduler:{name}", arguments)


def scheduler(folder: Path, jobs: int = 2, memory: int = 1 << 30) -> Scheduler:
    return Scheduler(jobs, memory, folder / "logs")


def test_values_come_back_and_order_is_kept(tmp_path: Path) -> None:
    heard: list[str] = []
    events = Events(ended=lambda node, outcome: heard.append(node.name))
    run = Scheduler(2, 1 << 30, tmp_path, events)
    nodes = [
        Node("c", call("work", value=3), needs=("a", "b")),
        Node("b", call("work", value=2), needs=("a",)),
        Node("a", call("work", value=1)),
    ]
    outcomes = run.run(nodes)
    assert {name: outcome.value for name, outcome in outcomes.items()} == {"a": 1, "b": 2, "c": 3}
    assert heard == ["a", "b", "c"]


def test_a_failure_takes_only_what_needs_it(tmp_path: Path) -> None:
    nodes = [
        Node("bad", call("fail")),
        Node("user", call("complain")),
        Node("killed", call("crash")),
        Node("after bad", call("work", value=0), needs=("bad",)),
        Node("after after", call("work", value=0), needs=("after bad",)),
        Node("good", call("work", value=7)),
    ]
    outcomes = scheduler(tmp_path).run(nodes)
    assert outcomes["good"].value == 7
    assert outcomes["bad"].failure == "ZeroDivisionError: by nought"
    assert "ZeroDivisionError" in (tmp_path / "logs" / "bad.log").read_text()
    assert str(outcomes["user"].error) == "model: is broken; mend it"
    assert "ended with status -9" in str(outcomes["killed"].failure)
    assert outcomes["after bad"].failure == "bad did not succeed"
    assert outcomes["after after"].failure == "after bad did not succeed"
    assert [name for name, outcome in outcomes.items() if succeeded(outcome)] == ["good"]


@pytest.mark.parametrize(("memory", "together"), [(100, True), (60, False)])
def test_nodes_run_side_by_side_as_memory_allows(memory: int, together: bool, tmp_path: Path) -> None:
    nodes = [Node(name, call("stamp", path=tmp_path / name), memory=50) for name in ("a", "b")]
    outcomes = scheduler(tmp_path, memory=memory).run(nodes)
    assert all(succeeded(outcome) for outcome in outcomes.values())
    (start_a, end_a), (start_b, end_b) = (map(float, (tmp_path / name).read_text().split()) for name in ("a", "b"))
    overlap = min(end_a, end_b) - max(start_a, start_b)
    # Starting an interpreter takes longer on some days than the nodes sleep, so only the one direction is certain.
    assert together or overlap <= 0


def test_a_node_over_the_limit_still_runs_alone(tmp_path: Path) -> None:
    assert scheduler(tmp_path, memory=10).run([Node("big", call("work", value=1), memory=50)])["big"].value == 1


def test_workers_end_with_the_run_that_started_them(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from gemexport.engine.scheduler import Node, Scheduler\n"
        "from gemexport.engine.worker import Call\n"
        f"call = Call('test_scheduler:linger', {{'path': Path({str(tmp_path / 'pid')!r})}})\n"
        f"Scheduler(1, 1 << 30, Path({str(tmp_path / 'logs')!r})).run([Node('lingers', call)])\n"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        while not (tmp_path / "pid").exists():
            assert parent.poll() is None
            time.sleep(0.05)
        worker = int((tmp_path / "pid").read_text())
        parent.kill()
    deadline = time.monotonic() + 20
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


def test_a_worker_that_is_ready_serves_the_first_light_node(tmp_path: Path) -> None:
    with prepared(2) as workers:
        (ready,) = (worker.process for worker in workers.idle)
        run = Scheduler(2, 1 << 30, tmp_path, workers=workers)
        nodes = [Node("heavy", call("which")), Node("light", call("which"), needs=("heavy",), light=True)]
        served = {name: outcome.value for name, outcome in run.run(nodes).items()}
    assert served["light"] == ready.pid != served["heavy"]
    assert ready.poll() is not None


def test_a_worker_that_got_ready_for_nothing_ends(tmp_path: Path) -> None:
    with prepared() as workers:
        (ready,) = (worker.process for worker in workers.idle)
        assert ready.poll() is None
    assert ready.poll() is not None


def test_peak_memory_is_measured(tmp_path: Path) -> None:
    outcome = scheduler(tmp_path).run([Node("big", call("swallow_memory"))])["big"]
    if outcome.peak_bytes is None:
        pytest.skip("this system does not tell anonymous memory")
    assert 200 << 20 <= outcome.peak_bytes < 600 << 20
