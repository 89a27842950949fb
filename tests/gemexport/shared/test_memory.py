"""What a step takes: its own memory, and that of the processes that work for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gemexport.shared.memory import MemoryWatch, anonymous_bytes, available_memory, descendants, step_bytes

pytestmark = pytest.mark.skipif(anonymous_bytes() is None, reason="the system does not tell")

HOLDS = "import sys; held = bytearray(b'1') * 50_000_000; print('ready', flush=True); sys.stdin.read()"
# One that does nothing itself, and whose child holds the memory.
STARTS = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS!r}])"


@contextmanager
def running(code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has said that it is ready, until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("code", [HOLDS, STARTS])
def test_memory_of_processes_that_work_for_it_counts(code: str) -> None:
    own = anonymous_bytes() or 0
    with running(code) as process, MemoryWatch(interval=0.005) as memory:
        while memory.peak is None:
            sum(range(1000))
        assert (step_bytes() or 0) > own + 45_000_000
        found = descendants(os.getpid())
    assert process.pid in found
    assert memory.peak > own + 45_000_000
    # One that has ended counts nothing.
    assert anonymous_bytes(process.pid) in (None, 0)
    assert descendants(process.pid) == []


def test_there_is_memory() -> None:
    assert available_memory() > 1 << 20
