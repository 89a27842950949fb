"""Runs a command and measures it: seconds, processor time, and the memory of all its processes together (Linux)."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.04  # seconds between two looks at the memory
SEARCH_EVERY = 5  # looks until new processes are searched for, which costs more than a look
FIELDS = ("RssAnon", "VmRSS")


@dataclass(frozen=True)
class Usage:
    """What a command took. Memory is the largest sum over its processes that was seen, in bytes."""

    seconds: float
    processor_seconds: float
    anonymous_bytes: int  # RssAnon: what the system cannot drop
    resident_bytes: int  # VmRSS: mapped pages of the checkpoint too

    def __add__(self, other: Usage) -> Usage:
        """Two commands one after the other."""
        return Usage(
            self.seconds + other.seconds,
            self.processor_seconds + other.processor_seconds,
            max(self.anonymous_bytes, other.anonymous_bytes),
            max(self.resident_bytes, other.resident_bytes),
        )


def _session(pid: str) -> int:
    # The command's name is in parentheses and may hold anything; the session is the fourth field after it.
    text = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    return int(text.rpartition(")")[2].split()[3])


def _members(session: int) -> list[str]:
    """The processes of a session."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if _session(pid) == session:
                found.append(pid)
        except (OSError, IndexError):  # it ended while we looked
            continue
    return found


def _memory(pids: list[str]) -> dict[str, int]:
    """Bytes of processes together, by the names in FIELDS."""
    total = dict.fromkeys(FIELDS, 0)
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text("utf-8", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, rest = line.partition(":")
            if name in total:
                total[name] += int(rest.split()[0]) * 1024
    return total


class _Sampler(threading.Thread):
    """Looks at the memory of a session until it is told to stop."""

    def __init__(self, session: int) -> None:
        super().__init__(daemon=True)
        self.session = session
        self.peak = dict.fromkeys(FIELDS, 0)
        self.done = threading.Event()

    def run(self) -> None:
        looks, pids = 0, [str(self.session)]
        while not self.done.wait(INTERVAL):
            if looks % SEARCH_EVERY == 0:
                pids = _members(self.session)
            looks += 1
            for name, size in _memory(pids).items():
                self.peak[name] = max(self.peak[name], size)


def measure(command: list[str], environment: dict[str, str] | None = None) -> Usage:
    """Run `command` to its end. Raises RuntimeError with the end of what it printed when it fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        sampler = _Sampler(process.pid)
        sampler.start()
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        sampler.done.set()
        sampler.join()
        if process.returncode:
            output.seek(0)
            end = output.read()[-3000:]
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{end}")
    return Usage(seconds, used.ru_utime + used.ru_stime, sampler.peak["RssAnon"], sampler.peak["VmRSS"])
