"""What processes take, and what there is."""

from __future__ import annotations

import os
import threading
from itertools import count
from pathlib import Path

_LOOKED_FOR = 5  # new processes, every so many samples: that takes as long as a dozen of them


class MemoryWatch:
    """Samples this process's anonymous memory (RssAnon: what mapped files take is the system's to drop).

    The memory of the processes that work for it counts as its own: those that it started, and those that these did.
    """

    def __init__(self, interval: float = 0.02) -> None:
        self.peak: int | None = None
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
        seen = set(descendants(os.getpid()))
        for tick in count():
            if self._stop.wait(self._interval):
                return
            if tick % _LOOKED_FOR == 0:
                # One that was just forked shares our memory, which would count twice, until it is another program.
                before, seen = seen, set(descendants(os.getpid()))
                processes = before & seen
            now = anonymous_bytes()
            if now is None:
                return
            self.peak = max(self.peak or 0, now + sum(anonymous_bytes(process) or 0 for process in processes))


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


def step_bytes() -> int | None:
    """The anonymous memory of this process and its descendants in bytes; None where the system does not tell."""
    own = anonymous_bytes()
    return None if own is None else own + sum(anonymous_bytes(process) or 0 for process in descendants(os.getpid()))


def descendants(process: int) -> list[int]:
    """The processes that a process started, and those that these did; none where the system does not tell.

    From /proc/PID/task/TID/children (proc(5)), a file of a few bytes for each thread.
    """
    found: list[int] = []
    for task in _threads(process):
        try:
            started = Path(f"/proc/{process}/task/{task}/children").read_text("ascii").split()
        except OSError:  # it has ended since, or the system does not tell
            continue
        for child in map(int, started):
            found += [child, *descendants(child)]
    return found


def _threads(process: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{process}/task")
    except OSError:
        return []


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
