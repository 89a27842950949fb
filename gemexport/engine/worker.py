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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from gemexport.formats.storage.errors import InputError
from gemexport.shared import scratch
from gemexport.shared.memory import MemoryWatch
from gemexport.shared.node import Call, Outcome

PREPARE = "prepare"


@dataclass(frozen=True)
class Task:
    """A call, the file that takes what it prints, and the folder for its temporary files."""

    call: Call
    log: Path
    scratch: Path


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


def _receive(connection: Connection[Any, Any], tasks: SimpleQueue[Task]) -> None:
    """Put what comes in into the queue; end this process when the other side of the socket is gone.

    A run that was killed must not compute on.
    """
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


def main() -> None:
    """Serve calls until the other side hangs up, then leave without the libraries' own endings: some hang or crash."""
    faulthandler.enable()
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    tasks: SimpleQueue[Task] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    if PREPARE in sys.argv[2:]:
        _prepare()
    while True:
        task = tasks.get()
        with task.log.open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        scratch.use(task.scratch)
        _serve(connection, task.call)
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
