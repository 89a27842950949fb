"""The processes that nodes run in (gemexport/engine/worker.py), as the side that gives them calls sees them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from gemexport.engine.worker import PREPARE, Task


@dataclass
class Worker:
    """One process, and the socket to it."""

    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]

    def give(self, task: Task) -> bool:
        """Send it a call; False where it has ended, so that nobody will answer."""
        try:
            self.connection.send(task)
        except ConnectionError:
            return False
        return self.process.poll() is None

    def kill(self) -> None:
        """End it now."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


class Workers:
    """Hires processes, and keeps those that may serve once more: starting one takes as long as some exports."""

    def __init__(self) -> None:
        self.idle: list[Worker] = []

    def serve(self, task: Task, threads: int, light: bool) -> Worker:
        """A process that has been given the call: an idle one for a light node, else a new one with so many threads.

        Whatever ended an idle one (the system takes memory from those first that do nothing), another takes its place.
        That a new one has ended at once is told by what is received of it.
        """
        while light and self.idle:
            worker = self.idle.pop()
            if worker.give(task):
                return worker
            worker.kill()
        with task.log.open("ab") as output:
            worker = _start(threads, output.fileno())
        worker.give(task)
        return worker

    def prepare(self, threads: int) -> None:
        """Hire a process for the first light node before there is one: it imports while the caller does."""
        self.idle.append(_start(threads, subprocess.DEVNULL, PREPARE))

    def keep(self, worker: Worker) -> None:
        """A worker that has served a light node waits for the next."""
        self.idle.append(worker)

    def dismiss(self) -> None:
        """End all that are idle."""
        while self.idle:
            self.idle.pop().kill()


@contextmanager
def prepared(jobs: int | None = None) -> Iterator[Workers]:
    """Workers of which one gets ready while the caller still imports and reads; they end with the block.

    `jobs` is how many nodes are to run side by side, by default one a core.
    """
    workers = Workers()
    workers.prepare(threads_each(jobs or os.cpu_count() or 1))
    try:
        yield workers
    finally:
        workers.dismiss()


def threads_each(jobs: int) -> int:
    """The threads for the libraries of one of so many nodes that run side by side."""
    return max(1, (os.cpu_count() or 1) // jobs)


def environment(threads: int) -> dict[str, str]:
    """What a process for steps finds in its environment: ours, and how its libraries are to behave."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # whatever is needed lies on the disk; nothing may wait for a network
        "PYTHONUNBUFFERED": "1",
        # Of GNU OpenMP: threads that spin while they wait for each other take three times the work, beside other steps.
        "GOMP_SPINCOUNT": "2000",
        # Of glibc: arrays of a slice come and go, and memory that the system gets back it clears before the next.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    }


def _start(threads: int, output: int, *arguments: str) -> Worker:
    ours, theirs = socket.socketpair()
    # -P: what is installed runs, not a folder called gemexport that happens to lie where we were started.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "gemexport.engine.worker", str(theirs.fileno()), *arguments],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment(threads),
    )
    theirs.close()
    return Worker(process, Connection(ours.detach()))
