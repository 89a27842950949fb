"""Work on what strangers wrote in a process of its own with limits of time and memory: templates, tokenizers' patterns.

`python -m gemexport.formats.storage.limited MODULE SECONDS BYTES` reads JSON, and writes as JSON what `answer` of the
module makes of it. Limits begin when the module is imported, and time is the processor's: a busy machine is no fault.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

SECONDS = 2.0
MEMORY = 512 << 20
OUTPUT = 16 << 20
WALL = 300.0  # for a process that waits instead of computing
_NO_MEMORY = 3


class ExceededError(Exception):
    """What was asked takes more time or memory than it may; the text says which: "takes more than 3 s"."""


def call(module: str, argument: Any, *, seconds: float = SECONDS, memory: int = MEMORY) -> Any:
    """What `answer(argument)` of a module returns; both are JSON.

    Raises ExceededError for more than `seconds` of computing, more than `memory` bytes on top of the interpreter's, or
    an answer of more than OUTPUT bytes.
    """
    command = [sys.executable, "-P", "-m", "gemexport.formats.storage.limited", module, str(seconds), str(memory)]
    try:
        data = json.dumps(argument).encode()
        done = subprocess.run(command, input=data, capture_output=True, timeout=WALL, check=False)
    except subprocess.TimeoutExpired as error:
        raise ExceededError(f"takes more than {WALL:.0f} s") from error
    if done.returncode in (_NO_MEMORY, -signal.SIGABRT, -signal.SIGSEGV):  # what libraries do without memory, or stack
        raise ExceededError(f"takes more than {memory >> 20} MB")
    if done.returncode in (-signal.SIGPROF, -signal.SIGXCPU, -signal.SIGKILL):
        raise ExceededError(f"takes more than {seconds:g} s")
    if done.returncode:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise RuntimeError(f"{module} ended with status {done.returncode}: {words[-1] if words else ''}")
    if len(done.stdout) > OUTPUT:
        raise ExceededError(f"makes more than {OUTPUT >> 20} MB")
    return json.loads(done.stdout)


def _limit(seconds: float, memory: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    last = int(used.ru_utime + used.ru_stime + seconds) + 2
    signal.setitimer(signal.ITIMER_PROF, seconds)  # ends the process
    resource.setrlimit(resource.RLIMIT_CPU, (last, last + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statistics = Path("/proc/self/statm")
    if statistics.exists():  # macOS does not keep to a limit of memory
        mapped = int(statistics.read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))


def main() -> None:
    """Read, answer, write."""
    argument, module = json.load(sys.stdin), import_module(sys.argv[1])
    _limit(float(sys.argv[2]), int(sys.argv[3]))
    try:
        text = json.dumps(module.answer(argument))
    except MemoryError:
        sys.exit(_NO_MEMORY)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
