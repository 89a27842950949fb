"""The DAG's scheduler: order, failures that stay local, memory, crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path

import pytest

from gemexport.engine.processes import prepared
from gemexport.engine.scheduler import Scheduler, in_order
from gemexport.formats.stamps import ChangedError, Stamps
from gemexport.formats.storage.errors import InputError
from gemexport.shared.node import Call, Events, Node, Outcome, StepError, succeeded, value_of

Progress = Callable[[int], None]


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


def crash(progress: Progress, number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def leave(progress: Progress) -> None:
    os._exit(3)


def meet(mine: Path, theirs: Path, progress: Progress) -> bool:
    """Give a sign, and wait for the other's, as long as starting an interpreter may take."""
    mine.touch()
    until = time.monotonic() + 60
    while not theirs.exists() and time.monotonic() < until:
        time.sleep(0.01)
    return theirs.exists()


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
        process = Path(f"/proc/{pid}")
        if not process.is_dir():  # a system without it
            return True
        state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z" or len(list((process / "task").iterdir())) > 1  # threads outlive the one that is waited for
    except (ProcessLookupError, FileNotFoundError):
        return False


def put_aside(progress: Progress) -> Path:
    """Leave a temporary file, and have a child leave one."""
    subprocess.run([sys.executable, "-c", "import tempfile; tempfile.mkstemp(prefix='child')"], check=True)
    return Path(tempfile.mkdtemp())


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
    return Scheduler(jobs, memory, folder)


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
    killed = outcomes["killed"]
    assert killed.reason == f"the process was killed; memory may be short; see {tmp_path / 'logs' / 'killed.log'}"
    assert killed.log is not None
    assert killed.log.is_file()
    assert outcomes["after bad"].reason == f"bad did not succeed: {outcomes['bad'].reason}"
    assert outcomes["after after"].reason == outcomes["after bad"].reason
    assert [name for name, outcome in outcomes.items() if succeeded(outcome)] == ["good"]


def test_a_node_that_can_do_without_another_is_told_how_that_ended(tmp_path: Path) -> None:
    def told(ending: Outcome) -> Call:
        return call("work", value=len(str(ending.failure)))

    nodes = [
        Node("bad", call("fail")),
        Node("good", call("work", value=7)),
        Node("after", call("work", value=0), needs=("good", "bad"), without={"bad": told}),
        Node("as ever", call("work", value=1), needs=("good",), without={"good": told}),
        Node("of another", call("work", value=2), needs=("bad", "good"), without={"good": told}),
    ]
    outcomes = scheduler(tmp_path).run(nodes)
    assert outcomes["after"].value == len("ZeroDivisionError: by nought")
    assert outcomes["as ever"].value == 1
    assert outcomes["of another"].left_out


def test_what_ended_a_process_has_a_name(tmp_path: Path) -> None:
    nodes = [Node("aborts", call("crash", number=int(signal.SIGABRT))), Node("leaves", call("leave"))]
    outcomes = scheduler(tmp_path).run(nodes)
    assert str(outcomes["aborts"].failure) == "the process ended by a signal (Aborted)"
    assert str(outcomes["leaves"].failure) == "the process ended with status 3"


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"a": ("b",), "b": ("c",), "c": ("a",)}, "steps wait for each other: "),
        ({"a": ("a",)}, "steps wait for each other: a needs a"),
        ({"a": (), "b": ("a", "z")}, "the step b needs z, and there is no such step"),
    ],
)
def test_what_can_never_start_is_an_error_before_anything_runs(
    needs: dict[str, tuple[str, ...]], message: str, tmp_path: Path
) -> None:
    started: list[str] = []
    run = Scheduler(2, 1 << 30, tmp_path, Events(started=lambda node: started.append(node.name)))
    with pytest.raises(ValueError, match=message):
        run.run([Node(name, call("work", value=0), after) for name, after in needs.items()])
    assert not started


def test_a_circle_is_told_step_by_step() -> None:
    needs = {"a": "b", "b": "c", "c": "a"}
    with pytest.raises(ValueError, match="wait for each other") as caught:
        in_order([Node(name, call("work"), (need,)) for name, need in needs.items()])
    told = str(caught.value).partition(": ")[2].split(" needs ")
    assert sorted(told[:-1]) == ["a", "b", "c"]
    assert all(needs[name] == need for name, need in pairwise(told))


def test_two_steps_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="two steps are called a"):
        in_order([Node("a", call("work")), Node("a", call("work"))])


def test_values_of_steps(tmp_path: Path) -> None:
    nodes = [Node("bad", call("fail")), Node("user", call("complain")), Node("good", call("work", value=7))]
    outcomes = scheduler(tmp_path).run(nodes)
    assert value_of("good", outcomes) == 7
    with pytest.raises(InputError, match="mend it"):
        value_of("user", outcomes)
    with pytest.raises(StepError, match=r"the step bad did not succeed: ZeroDivisionError: by nought; see .*bad\.log"):
        value_of("bad", outcomes)


def test_nodes_run_side_by_side_where_memory_allows(tmp_path: Path) -> None:
    """Each waits for the other's sign, so one after the other they would wait for ever."""
    names = {"a": "b", "b": "a"}
    nodes = [
        Node(name, call("meet", mine=tmp_path / name, theirs=tmp_path / other), memory=50)
        for name, other in names.items()
    ]
    outcomes = scheduler(tmp_path, memory=100).run(nodes)
    assert {name: outcome.value for name, outcome in outcomes.items()} == {"a": True, "b": True}


def test_nodes_wait_for_memory(tmp_path: Path) -> None:
    nodes = [Node(name, call("stamp", path=tmp_path / name), memory=50) for name in ("a", "b")]
    outcomes = scheduler(tmp_path, memory=60).run(nodes)
    assert all(succeeded(outcome) for outcome in outcomes.values())
    (start_a, end_a), (start_b, end_b) = (map(float, (tmp_path / name).read_text().split()) for name in ("a", "b"))
    assert min(end_a, end_b) <= max(start_a, start_b)


def test_a_node_over_the_limit_still_runs_alone(tmp_path: Path) -> None:
    assert scheduler(tmp_path, memory=10).run([Node("big", call("work", value=1), memory=50)])["big"].value == 1


def test_workers_end_with_the_run_that_started_them(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from gemexport.engine.scheduler import Scheduler\n"
        "from gemexport.shared.node import Call, Node\n"
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


def test_nobody_waits_in_memory_once_the_last_light_node_has_ended(tmp_path: Path) -> None:
    idle: list[bool] = []

    def started(node: Node) -> None:
        idle.append(ready.poll() is None)

    with prepared(2) as workers:
        (ready,) = (worker.process for worker in workers.idle)
        nodes = [Node("light", call("which"), light=True), Node("heavy", call("which"), needs=("light",))]
        Scheduler(2, 1 << 30, tmp_path, Events(started=started), workers).run(nodes)
    assert idle == [True, False]


def test_a_worker_that_died_idle_is_replaced(tmp_path: Path) -> None:
    with prepared(2) as workers:
        (ready,) = (worker.process for worker in workers.idle)
        ready.kill()
        ready.wait()
        run = Scheduler(2, 1 << 30, tmp_path, workers=workers)
        served = run.run([Node("light", call("which"), light=True)])["light"]
    assert served.failure is None
    assert served.value != ready.pid


def test_a_worker_that_died_between_two_steps_is_replaced(tmp_path: Path) -> None:
    """The second of two light nodes, whose process is killed as soon as the first has ended."""

    def ended(node: Node, outcome: Outcome) -> None:
        if node.name == "first":
            os.kill(outcome.value, signal.SIGKILL)
            while alive(outcome.value):
                time.sleep(0.01)

    nodes = [Node("first", call("which"), light=True), Node("second", call("which"), needs=("first",), light=True)]
    outcomes = Scheduler(1, 1 << 30, tmp_path, Events(ended=ended)).run(nodes)
    assert outcomes["second"].failure is None
    assert outcomes["second"].value != outcomes["first"].value


def test_a_worker_that_got_ready_for_nothing_ends(tmp_path: Path) -> None:
    with prepared() as workers:
        (ready,) = (worker.process for worker in workers.idle)
        assert ready.poll() is None
    assert ready.poll() is not None


def test_temporary_files_lie_in_the_work_folder_until_the_run_ends(tmp_path: Path) -> None:
    seen: list[str] = []

    def ended(node: Node, outcome: Outcome) -> None:
        seen.extend(sorted(item.name[:5] for item in (tmp_path / "tmp").iterdir()))
        assert outcome.value.parent == tmp_path / "tmp"

    with prepared(1) as workers:  # which has started before it is known where the work folder is
        node = Node("aside", call("put_aside"), light=True)
        outcomes = Scheduler(1, 1 << 30, tmp_path, Events(ended=ended), workers).run([node])
    assert succeeded(outcomes["aside"])
    assert "child" in seen
    assert len(seen) == 2
    assert not (tmp_path / "tmp").exists()


def test_peak_memory_is_measured(tmp_path: Path) -> None:
    outcome = scheduler(tmp_path).run([Node("big", call("swallow_memory"))])["big"]
    if outcome.peak_bytes is None:
        pytest.skip("this system does not tell anonymous memory")
    assert 200 << 20 <= outcome.peak_bytes < 600 << 20


def test_what_fails_beside_ends_the_run(tmp_path: Path) -> None:
    started, beside = tmp_path / "pid", Future[None]()

    def fails(node: Node) -> None:
        beside.set_exception(InputError("tokenizer.json", "is broken", "save it again"))

    scheduler = Scheduler(1, 1 << 30, tmp_path, Events(started=fails))
    with pytest.raises(InputError, match="is broken"):
        scheduler.run([Node("lingers", call("linger", path=started))], beside)
    assert not started.exists() or not alive(int(started.read_text()))


def test_what_fails_beside_for_want_of_a_file_is_told_as_the_change_that_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    source, beside = Stamps.of(tmp_path), Future[None]()
    (tmp_path / "config.json").unlink()
    beside.set_exception(FileNotFoundError("config.json"))
    with pytest.raises(ChangedError, match="was removed while it was read"):
        Scheduler(1, 1 << 30, tmp_path / "work", source=source).run([], beside)


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_ends_no_sooner_than_what_is_beside_it(tmp_path: Path, fails: bool) -> None:
    beside = Future[None]()

    def last(node: Node, outcome: Outcome) -> None:
        beside.set_exception(InputError("x", "is broken", "mend it")) if fails else beside.set_result(None)

    def run() -> dict[str, Outcome]:
        nodes = [Node("works", call("work", value=3))]
        return Scheduler(1, 1 << 30, tmp_path, Events(ended=last)).run(nodes, beside)

    if fails:
        with pytest.raises(InputError, match="is broken"):
            run()
    else:
        assert run()["works"].value == 3


def test_a_node_without_work_is_passed_over(tmp_path: Path) -> None:
    heard: list[str] = []
    nodes = [
        Node("first", call("work", value=3)),
        Node("second", call("fail"), ("first",), idle=lambda outcomes: outcomes["first"].value == 3),
        Node("third", call("work", value=4), ("second",), idle=lambda outcomes: "second" not in outcomes),
    ]
    events = Events(ended=lambda node, outcome: heard.append(node.name))
    outcomes = Scheduler(2, 1 << 30, tmp_path, events).run(nodes)
    assert outcomes["second"] == Outcome()
    assert outcomes["third"].value == 4
    assert heard == ["first", "third"]
