"""A process for nodes of the DAG: `python -m gemexport.engine.worker FD [prepare]` takes calls from the socket FD.

A process of its own means that a runtime that crashes takes nothing else along, that its memory can be told, and that
what a library prints goes into the node's log. It is a fresh interpreter, not a fork or multiprocessing's spawn, which
would import the caller's script again. One that served a light node is kept for the next such: starting an interpreter
and importing takes as long as some exports. With `prepare` it imports what such nodes need before it is given one.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from gemexport.formats.storage.errors import InputError

PREPARE = "prepare"


@dataclass(frozen=True)
class Call:
    """A function by its dotted name (`module:function`) and what it is called with."""

    function: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Request:
    """A call, and the file that takes what it prints."""

    call: Call
    log: Path


@dataclass(frozen=True)
class Outcome:
    """How a node ended: its value, or what went wrong."""

    value: Any = None
    error: InputError | None = None  # the user's to mend
    failure: str | None = None  # ours, or the machine's: one line
    seconds: float = 0.0
    peak_bytes: int | None = None  # anonymous memory
    log: Path | None = None  # of a failure: what the step printed, with the traceback
    left_out: bool = False  # it never ran: what it needs had failed, as `failure` says

    @property
    def reason(self) -> str:
        """Why there is no value, in one line that says where more is to be read."""
        if self.error is not None:
            return str(self.error)
        return f"{self.failure}; see {self.log}" if self.log else str(self.failure)


class MemoryWatch:
    """Samples this process's anonymous memory (RssAnon: what mapped files take is the system's to drop).

    `children` are processes that work for it, whose memory counts as its own.
    """

    def __init__(self, interval: float = 0.02, children: Sequence[int] = ()) -> None:
        self.peak: int | None = None
        self._children = children
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            now = anonymous_bytes()
            if now is None:
                return
            now += sum(anonymous_bytes(child) or 0 for child in self._children)
            self.peak = max(self.peak or 0, now)


def anonymous_bytes(process: int | None = None) -> int | None:
    """RssAnon of a process (this one) in bytes; None where the system does not tell (macOS), or it has ended."""
    try:
        status = Path(f"/proc/{process or 'self'}/status").read_text("ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


def run(call: Call, report: Callable[[int], None]) -> Outcome:
    """Make the call; what it raises becomes part of the outcome."""
    started = time.monotonic()
    value, error, failure = None, None, None
    with MemoryWatch() as memory:
        try:
            module, name = call.function.split(":")
            value = getattr(import_module(module), name)(**call.arguments, progress=report)
        except InputError as caught:
            error = caught
        except Exception as caught:
            traceback.print_exc()
            failure = f"{type(caught).__name__}: {caught}".splitlines()[0]
    return Outcome(value, error, failure, time.monotonic() - started, memory.peak)


def _receive(connection: Connection[Any, Any], requests: SimpleQueue[Request]) -> None:
    """Put what comes in into the queue; end this process when the other side of the socket is gone.

    A run that was killed must not compute on.
    """
    try:
        while True:
            requests.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


def main() -> None:
    """Serve calls until the other side hangs up, then leave without the libraries' own endings: some hang or crash."""
    faulthandler.enable()
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    requests: SimpleQueue[Request] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()
    if PREPARE in sys.argv[2:]:
        _prepare()
    while True:
        request = requests.get()
        with request.log.open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        _serve(connection, request.call)
        sys.stdout.flush()
        sys.stderr.flush()


def _prepare() -> None:
    """Import what the first calls need. What fails here fails again in the call that needs it, and is told there."""
    # Imports make hundreds of thousands of objects, and no garbage worth a tenth of their time.
    gc.disable()
    with suppress(Exception):
        import_module("gemexport.engine.steps").prepare()
    gc.enable()


def _serve(connection: Connection[Any, Any], call: Call) -> None:
    pending, last = 0, 0.0

    def report(amount: int) -> None:
        nonlocal pending, last
        pending += amount
        if time.monotonic() - last > 0.05:
            connection.send(pending)
            pending, last = 0, time.monotonic()

    outcome = run(call, report)
    connection.send(pending)
    connection.send(outcome)


if __name__ == "__main__":
    # Run as a module this file is `__main__`, and its classes would be pickled under that name.
    from gemexport.engine.worker import main as serve

    serve()
