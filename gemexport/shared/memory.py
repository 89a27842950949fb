"""What processes take, and what there is."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path


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
