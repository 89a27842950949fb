"""How fast a runtime was and what it took, from the passes that the validator makes anyhow.

Steps run side by side on whatever machine this is, so these figures describe a run; no verdict rests on them.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from gemexport.shared.measured import Pace, SpeedReport
from gemexport.shared.memory import MemoryWatch, step_bytes
from gemexport.validators.runtimes.protocol import Laps, Runtime


class Stopwatch:
    """Seconds of a step by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, what: str) -> Iterator[None]:
        """Add the block's time to what was spent on `what` already."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started


class Speedometer:
    """What one runtime took: made before it is loaded, asked after `loaded`, `judged` and `generating`."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._before = step_bytes()
        self._started = time.perf_counter()
        self._load_seconds = 0.0
        self._judged = 0
        self._peak: int | None = None

    def loaded(self) -> None:
        """The runtime is there."""
        self._load_seconds = time.perf_counter() - self._started

    @contextmanager
    def generating(self, runtime: Runtime) -> Iterator[None]:
        """The block is the greedy continuation; what the runtime computed before are the sequences."""
        self._judged = len(runtime.laps.laps)
        with MemoryWatch() as memory:
            yield
        self._peak = memory.peak

    def report(self, laps: Laps) -> SpeedReport:
        """Prefill from the sequences alone: the prompt of the continuation is too short to compare."""
        return SpeedReport(
            threads=self._threads,
            load_seconds=self._load_seconds,
            tokens=sum(tokens for tokens, _ in laps.laps),
            seconds=sum(seconds for _, seconds in laps.laps),
            prefill=pace([lap for lap in laps.laps[: self._judged] if lap[0] > 1]),
            decode=pace([lap for lap in laps.laps if lap[0] == 1]),
            peak_rss_bytes=self._peak,
            idle_rss_bytes=self._before,
        )


def pace(laps: Sequence[tuple[int, float]]) -> Pace | None:
    """Median and quartiles of tokens a second; None when there is nothing to tell."""
    rates = [tokens / seconds for tokens, seconds in laps if seconds > 0]
    if not rates:
        return None
    lower, median, upper = (float(value) for value in np.quantile(rates, [0.25, 0.5, 0.75]))
    return Pace(tokens=sum(tokens for tokens, _ in laps), pieces=len(rates), lower=lower, median=median, upper=upper)


def machine() -> str:
    """Processor, cores and system, as a reader wants to know them beside a speed."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):  # not Linux, or a processor that goes without a name there
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = os.cpu_count() or 1
    return f"{processor}, {cores} core{'s' if cores > 1 else ''}, {platform.system()} {platform.machine()}"
