"""How the tests run: side by side on the cores that there are, and how long they may take.

`pytest` alone uses a process a core; one that is given files uses none but its own. At the end of a run of folders
comes a table of seconds by group of tests, beside the budgets of pyproject.toml. No test fails for its time.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

MOST_WORKERS = 8
WORKER_BYTES = 2 << 30  # what a process takes that has imported all runtimes and runs a small model
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# Before a library reads it: the processes of a run share the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Budgets are settings: a line for a group, with its seconds of all processes, fast tests and slow ones."""
    parser.addini("budgets", "GROUP FAST SLOW, in seconds of processes", type="linelist")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """For `-n auto`: none for files, else one a core as far as there is memory."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    if files_only(config):
        return 0
    from gemexport.shared.memory import available_memory

    return max(1, min(CORES, MOST_WORKERS, available_memory() // WORKER_BYTES))


def files_only(config: pytest.Config) -> bool:
    """Whether the run was given files or tests, and no folder."""
    return all(Path(argument.partition("::")[0]).is_file() for argument in config.args)


def pytest_configure(config: pytest.Config) -> None:
    """Where the tests are run, or handed out, their seconds are added up."""
    if not hasattr(config, "workerinput") and not files_only(config):
        config.pluginmanager.register(Times(config.getini("budgets")))


class Times:
    """Seconds by group of tests, fast and slow."""

    def __init__(self, budgets: list[str]) -> None:
        self._budgets: dict[tuple[str, str], float] = {}
        for line in budgets:
            group, fast, slow = line.split()
            self._budgets |= {(group, "fast"): float(fast), (group, "slow"): float(slow)}
        self._seconds: Counter[tuple[str, str]] = Counter()
        self._tests: Counter[tuple[str, str]] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add what setting up, running or tearing down a test took."""
        kind = "slow" if "slow" in report.keywords else "fast"
        folders = Path(report.nodeid.partition("::")[0]).parent.parts[1:]
        group = (folders[0] if folders else "runs", kind)
        self._seconds[group] += report.duration
        self._tests[group] += report.when == "call"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table, and loudly what is over its budget."""
        if not self._seconds:
            return
        terminalreporter.section("seconds of all processes, by group")
        terminalreporter.write_line(f"{'group':<20}{'tests':>8}{'seconds':>10}{'budget':>10}")
        for group in sorted(self._seconds, key=lambda key: (key[1], key[0])):
            seconds, budget = self._seconds[group], self._budgets.get(group)
            row = f"{', '.join(group):<20}{self._tests[group]:>8}{seconds:>10.0f}"
            over = budget is not None and seconds > budget
            row += "" if budget is None else f"{budget:>10.0f}"
            terminalreporter.write_line(row + ("   OVER BUDGET" if over else ""), red=over, bold=over)
        total = sum(self._seconds.values())
        terminalreporter.write_line(f"{'all':<20}{sum(self._tests.values()):>8}{total:>10.0f}")
