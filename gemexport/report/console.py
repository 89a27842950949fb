"""What a run shows while it runs: progress bars on a terminal, plain lines elsewhere, on standard error."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gemexport.shared.node import Events, Node, Outcome, succeeded


@dataclass(frozen=True)
class Advance:
    """How far a step has come: `done` of `total`, in the step's own unit; it starts at 0 and has then ended or not.

    `reason` is why a step that has ended has no value, in one line.
    """

    step: str
    done: int
    total: int
    ended: bool = False
    reason: str | None = None
    seconds: float | None = None  # of a step that has ended


Listener = Callable[[Advance], None]


@contextmanager
def listening(listener: Listener | None) -> Iterator[Events]:
    """Events for a caller in Python: its listener's, else bars on a terminal until the block ends, else nobody's."""
    if listener is not None:
        yield _Told(listener).events()
        return
    console = Console(stderr=True, highlight=False)
    with watching(quiet=not console.is_terminal) as events:
        yield events


@contextmanager
def watching(quiet: bool = False) -> Iterator[Events]:
    """Events that draw themselves until the block ends."""
    console = Console(stderr=True, highlight=False)
    if quiet:
        yield Events()
    elif console.is_terminal:
        with _bars(console) as progress:
            yield _Bars(progress).events()
    else:
        yield _Lines().events()


def _bars(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:<30}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


class _Told:
    """Passes on how far each step has come, and no step beyond its estimated end."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._done: Counter[str] = Counter()

    def events(self) -> Events:
        return Events(self.started, self.advanced, self.ended)

    def started(self, node: Node) -> None:
        self._listener(Advance(node.name, 0, max(node.total, 1)))

    def advanced(self, node: Node, amount: int) -> None:
        self._done[node.name] += amount
        total = max(node.total, 1)
        self._listener(Advance(node.name, min(self._done[node.name], total), total))

    def ended(self, node: Node, outcome: Outcome) -> None:
        total = max(node.total, 1)
        good = succeeded(outcome)
        done, reason = (total, None) if good else (min(self._done[node.name], total), outcome.reason)
        self._listener(Advance(node.name, done, total, True, reason, outcome.seconds))


class _Bars:
    """One bar a node, from its start."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def events(self) -> Events:
        return Events(self.started, self.advanced, self.ended)

    def started(self, node: Node) -> None:
        self._tasks[node.name] = self._progress.add_task(node.name, total=max(node.total, 1))

    def advanced(self, node: Node, amount: int) -> None:
        self._progress.advance(self._tasks[node.name], amount)

    def ended(self, node: Node, outcome: Outcome) -> None:
        if node.name not in self._tasks:
            return
        task = self._tasks[node.name]
        if succeeded(outcome):
            self._progress.update(task, completed=max(node.total, 1))
        else:
            reason = escape(outcome.reason)
            self._progress.update(task, description=f"[red]{node.name}: {reason}")
        self._progress.stop_task(task)


class _Lines:
    """A line for each node that has ended, and one in `every` seconds for each that takes longer."""

    def __init__(self, every: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._clock = every, clock
        self._done: Counter[str] = Counter()
        self._started: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def events(self) -> Events:
        return Events(self.started, self.advanced, _line)

    def started(self, node: Node) -> None:
        self._started[node.name] = self._told[node.name] = self._clock()

    def advanced(self, node: Node, amount: int) -> None:
        self._done[node.name] += amount
        now, share = self._clock(), min(self._done[node.name] / max(node.total, 1), 1.0)
        if not share or now - self._told[node.name] < self._every:
            return
        self._told[node.name] = now
        left = (now - self._started[node.name]) * (1 - share) / share
        print(f"{node.name}: {share:.0%}, about {_duration(left)} left", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """About how long: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _line(node: Node, outcome: Outcome) -> None:
    result = "done" if succeeded(outcome) else outcome.reason
    print(f"{node.name}: {result} ({outcome.seconds:.1f} s)", file=sys.stderr, flush=True)
