"""Runs a DAG of calls in processes of their own, side by side as far as cores and memory allow."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from gemexport.engine.processes import Worker, Workers, threads_each
from gemexport.engine.worker import Task
from gemexport.formats.stamps import NOTHING, ChangedError, Stamps
from gemexport.shared import scratch
from gemexport.shared.node import Call, Events, Node, Outcome, succeeded

LOGS = "logs"  # folder in the work folder
KEPT_BYTES = 256 << 20  # a process that has taken more is not kept: what it still holds would add to the next step
_IDLE = Outcome()  # of a node that had no work


@dataclass
class _Running:
    node: Node
    worker: Worker
    log: Path


@dataclass
class Scheduler:
    """Runs nodes as soon as what they need is there, `jobs` at a time, their estimates within `memory` bytes.

    A node whose estimate alone is over the limit runs by itself. When a node fails, those that cannot do without it are
    left out; all others run on. The folder `work` gets their logs, and the temporary files that are gone when the run
    ends.
    """

    jobs: int
    memory: int
    work: Path
    events: Events = field(default_factory=Events)
    workers: Workers = field(default_factory=Workers)  # perhaps with one that is ready
    source: Stamps = NOTHING  # what the nodes read, which must stay as it is

    def run(self, nodes: Sequence[Node], beside: Future[Any] | None = None) -> dict[str, Outcome]:
        """Run all nodes; the outcome of each by its name, those left out with the reason as `failure`.

        What fails in `beside`, a thread of ours on which they rest, ends them all and is raised.
        ValueError, before anything runs, for nodes that wait for each other, or for one that there is not.
        ChangedError when the source is another one than it was, before a node starts or after it ended, however it did.
        """
        order, named = in_order(nodes), {node.name: node for node in nodes}
        ended_beside = None if beside is None else _signal(beside)
        (self.work / LOGS).mkdir(parents=True, exist_ok=True)
        ready: set[str] = set()
        running: dict[int, _Running] = {}
        outcomes: dict[str, Outcome] = {}
        light = {node.name for node in nodes if node.light}
        try:
            while order.is_active():
                ready.update(order.get_ready())
                waiting = [node for name, node in named.items() if name in ready]
                ended = _hopeless(waiting, outcomes) or _idle(waiting, outcomes)
                if not ended:
                    for node in self._startable(waiting, running):
                        ready.remove(node.name)
                        started = self._start(node, node.call_after(outcomes))
                        running[started.worker.connection.fileno()] = started
                    ended = self._wait(running, ended_beside)
                    if beside is not None and beside.done():
                        self._end(beside)
                        ended_beside = None
                light.difference_update(node.name for node, _ in ended)
                if not light:  # nobody waits for what they hold in memory
                    self.workers.dismiss()
                self._check_source(ended)
                for node, outcome in ended:
                    ready.discard(node.name)
                    outcomes[node.name] = outcome
                    order.done(node.name)
                    if outcome is not _IDLE:
                        self.events.ended(node, outcome)
            if beside is not None:
                self._end(beside)
        finally:
            for item in running.values():
                item.worker.kill()
            self.workers.dismiss()
            shutil.rmtree(self.work / scratch.FOLDER, ignore_errors=True)
        return outcomes

    def _end(self, beside: Future[Any]) -> None:
        """Wait for what ran beside the nodes; of a source that changed whatever went wrong there is a consequence."""
        try:
            beside.result()
        except Exception:
            self.source.check()
            raise

    def _startable(self, ready: list[Node], running: dict[int, _Running]) -> list[Node]:
        """Those of the nodes that are ready for which there is room beside those that run."""
        used = sum(item.node.memory for item in running.values())
        count, chosen = len(running), []
        for node in ready:
            alone = count == 0
            if count < self.jobs and (alone or used + node.memory <= self.memory):
                chosen.append(node)
                count, used = count + 1, used + node.memory
        return chosen

    def _check_source(self, ended: list[tuple[Node, Outcome]]) -> None:
        """Raise ChangedError where nodes read something else than they should have."""
        for _, outcome in ended:
            if isinstance(outcome.error, ChangedError):
                raise outcome.error
        if ended:
            self.source.check()

    def _start(self, node: Node, call: Call) -> _Running:
        self.source.check()
        log = self.work / LOGS / f"{node.name.replace('/', '-').replace(':', '-')}.log"
        log.write_bytes(b"")
        threads = (os.cpu_count() or 1) if node.all_cores else threads_each(self.jobs)
        worker = self.workers.serve(Task(call, log, self.work / scratch.FOLDER), threads, node.light)
        self.events.started(node)
        return _Running(node, worker, log)

    def _wait(self, running: dict[int, _Running], beside: Connection | None) -> list[tuple[Node, Outcome]]:
        """Wait until a node has something to say, and pass it on, or `beside` has ended; the nodes that have ended."""
        found = []
        others = [] if beside is None else [beside]
        for ready in wait([*others, *(item.worker.connection for item in running.values())]):
            assert isinstance(ready, Connection)
            if ready is beside:
                continue
            item = running[ready.fileno()]
            outcome = self._receive(item)
            if outcome is None:
                continue
            del running[ready.fileno()]
            if item.node.light and succeeded(outcome) and (outcome.peak_bytes or 0) <= KEPT_BYTES:
                self.workers.keep(item.worker)
            else:
                item.worker.kill()
            found.append((item.node, outcome))
        return found

    def _receive(self, item: _Running) -> Outcome | None:
        """One message of a running node; its outcome when that was the last."""
        try:
            message = item.worker.connection.recv()
        except (EOFError, ConnectionResetError, pickle.UnpicklingError):
            return Outcome(failure=ending(item.worker.process.wait()), log=item.log)
        if not isinstance(message, Outcome):
            self.events.advanced(item.node, message)
            return None
        return replace(message, log=item.log)


def _signal(future: Future[Any]) -> Connection:
    """A connection that can be waited for with others; it is ready once the future is done."""
    receiver, sender = Pipe(duplex=False)
    future.add_done_callback(lambda _: sender.close())
    return receiver


def in_order(nodes: Sequence[Node]) -> TopologicalSorter[str]:
    """The nodes by name, each of them ready once those that it needs are done.

    ValueError for a node that needs itself, if only through others, or one that there is not; and for two of one name.
    """
    order: TopologicalSorter[str] = TopologicalSorter()
    names = [node.name for node in nodes]
    for node in nodes:
        if names.count(node.name) > 1:
            raise ValueError(f"two steps are called {node.name}")
        unknown = [need for need in node.needs if need not in names]
        if unknown:
            raise ValueError(f"the step {node.name} needs {unknown[0]}, and there is no such step")
        order.add(node.name, *node.needs)
    try:
        order.prepare()
    except CycleError as error:
        raise ValueError(f"steps wait for each other: {' needs '.join(reversed(error.args[1]))}") from error
    return order


def _hopeless(nodes: Sequence[Node], outcomes: Mapping[str, Outcome]) -> list[tuple[Node, Outcome]]:
    """Those of the nodes of which a need has failed that they cannot do without, and that as their outcome."""
    found = []
    for node in nodes:
        needs = (need for need in node.needs if need not in node.without)
        failed = next((need for need in needs if not succeeded(outcomes[need])), None)
        if failed is not None:
            before = outcomes[failed]
            cause = before.failure if before.left_out else f"{failed} did not succeed: {before.reason}"
            found.append((node, Outcome(failure=cause, left_out=True)))
    return found


def _idle(nodes: Sequence[Node], outcomes: Mapping[str, Outcome]) -> list[tuple[Node, Outcome]]:
    """Those of the nodes that have no work after what went before; they end without a value, and nobody hears of it."""
    return [(node, _IDLE) for node in nodes if node.idle(outcomes)]


def ending(status: int) -> str:
    """What became of a process that had not said all yet: the signal that ended it, or its status."""
    if status == -signal.SIGKILL:
        return "the process was killed; memory may be short"
    if status < 0:
        return f"the process ended by a signal ({signal.strsignal(-status)})"
    return f"the process ended with status {status}"
