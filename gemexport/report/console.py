"""What a run shows while it runs: progress bars on a terminal, plain lines elsewhere, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from gemexport.shared.node import Events, Node, Outcome, succeeded


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
        yield Events(ended=_line)


def _bars(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:<30}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


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


def _line(node: Node, outcome: Outcome) -> None:
    result = "done" if succeeded(outcome) else outcome.reason
    print(f"{node.name}: {result} ({outcome.seconds:.1f} s)", file=sys.stderr, flush=True)
