"""Runs a DAG of calls in processes of their own, side by side as far as cores and memory allow."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from gemexport.engine.processes import Worker, Workers, threads_each
from gemexport.engine.worker import Call, Outcome, Request


@dataclass(frozen=True)
class Node:
    """One step: a call, the nodes whose results it waits for, and what it takes."""

    name: str
    call: Call
    needs: tuple[str, ...] = ()
    memory: int = 0  # anonymous bytes, estimated
    total: int = 0  # units of progress
    all_cores: bool = False  # others wait for it, so it may use every core; else its share of them
    light: bool = False  # loads no runtime: it may share a process, one after the other, with other light ones


@dataclass
class Events:
    """What the caller hears while the DAG runs."""

    started: Callable[[Node], None] = lambda node: None
    advanced: Callable[[Node, int], None] = lambda node, amount: None
    ended: Callable[[Node, Outcome], None] = lambda node, outcome: None


@dataclass
class _Running:
    node: Node
    worker: Worker
    log: Path


@dataclass
class Scheduler:
    """Runs nodes as soon as what they need is there, `jobs` at a time, their estimates within `memory` bytes.

    A node whose estimate alone is over the limit runs by itself. When a node fails, those that need it are left out;
    all others run on.
    """

    jobs: int
    memory: int
    logs: Path
    events: Events = field(default_factory=Events)
    workers: Workers = field(default_factory=Workers)  # perhaps with one that is ready

    def run(self, nodes: Sequence[Node]) -> dict[str, Outcome]:
        """Run all nodes; the outcome of each by its name, those left out with the reason as `failure`."""
        self.logs.mkdir(parents=True, exist_ok=True)
        waiting, running, outcomes = list(nodes), {}, {}  # type: list[Node], dict[int, _Running], dict[str, Outcome]
        try:
            while waiting or running:
                self._drop_hopeless(waiting, outcomes)
                for node in self._startable(waiting, running, outcomes):
                    waiting.remove(node)
                    started = self._start(node)
                    running[started.worker.connection.fileno()] = started
                if not running:
                    continue
                for ready in wait([item.worker.connection for item in running.values()]):
                    assert isinstance(ready, Connection)
                    item = running[ready.fileno()]
                    outcome = self._receive(item)
                    if outcome is not None:
                        del running[ready.fileno()]
                        if item.node.light and succeeded(outcome):
                            self.workers.keep(item.worker)
                        else:
                            item.worker.kill()
                        outcomes[item.node.name] = outcome
                        self.events.ended(item.node, outcome)
        finally:
            for item in running.values():
                item.worker.kill()
            self.workers.dismiss()
        return outcomes

    def _drop_hopeless(self, waiting: list[Node], outcomes: dict[str, Outcome]) -> None:
        """Give an outcome to nodes of which a need has failed, over and over until none is left."""
        for node in list(waiting):
            failed = [need for need in node.needs if need in outcomes and not succeeded(outcomes[need])]
            if failed:
                waiting.remove(node)
                outcomes[node.name] = Outcome(failure=f"{failed[0]} did not succeed")
                self.events.ended(node, outcomes[node.name])
                self._drop_hopeless(waiting, outcomes)
                return

    def _startable(self, waiting: list[Node], running: dict[int, _Running], outcomes: dict[str, Outcome]) -> list[Node]:
        used = sum(item.node.memory for item in running.values())
        count, chosen = len(running), []
        for node in waiting:
            if not all(need in outcomes for need in node.needs):
                continue
            alone = count == 0
            if count < self.jobs and (alone or used + node.memory <= self.memory):
                chosen.append(node)
                count, used = count + 1, used + node.memory
        return chosen

    def _start(self, node: Node) -> _Running:
        log = self.logs / f"{node.name.replace('/', '-').replace(':', '-')}.log"
        log.write_bytes(b"")
        threads = (os.cpu_count() or 1) if node.all_cores else threads_each(self.jobs)
        worker = (self.workers.hire_light if node.light else self.workers.hire)(threads, log)
        worker.connection.send(Request(node.call, log))
        self.events.started(node)
        return _Running(node, worker, log)

    def _receive(self, item: _Running) -> Outcome | None:
        """One message of a running node; its outcome when that was the last."""
        try:
            message = item.worker.connection.recv()
        except (EOFError, ConnectionResetError, pickle.UnpicklingError):
            status = item.worker.process.wait()
            return Outcome(failure=f"the process ended with status {status}; see {item.log}")
        if isinstance(message, Outcome):
            return message
        self.events.advanced(item.node, message)
        return None


def succeeded(outcome: Outcome) -> bool:
    """Whether a node has a value to go on with."""
    return outcome.error is None and outcome.failure is None


def available_memory() -> int:
    """Bytes that the system can give without swapping; half of a guess of 8 GB where it does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return pages * size // 2
    return 4 << 30
