"""The steps of a run as data: what is called, what it needs, how it ended, and who wants to hear of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from gemexport.formats.storage.errors import InputError, shown


@dataclass(frozen=True)
class Call:
    """A function by its dotted name (`module:function`) and what it is called with."""

    function: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a node ended: its value, or what went wrong."""

    value: Any = None
    error: InputError | None = None  # the user's to mend
    failure: str | None = None  # ours, or the machine's: one line
    seconds: float = 0.0
    peak_bytes: int | None = None  # anonymous memory
    log: Path | None = None  # what the step printed, with the traceback of a failure
    left_out: bool = False  # it never ran: what it needs had failed, as `failure` says

    @property
    def reason(self) -> str:
        """Why there is no value, in one line that says where more is to be read."""
        if self.error is not None:
            return str(self.error)
        return shown(f"{self.failure}; see {self.log}" if self.log else str(self.failure))


@dataclass(frozen=True)
class Node:
    """One step: a call, the nodes whose results it waits for, and what it takes."""

    name: str
    call: Call
    needs: tuple[str, ...] = ()
    _: KW_ONLY
    memory: int = 0  # anonymous bytes, estimated
    total: int = 0  # units of progress
    writes: int = 0  # bytes that it adds to the disk until the run ends, estimated
    scratch: int = 0  # bytes on the disk while it runs, estimated
    all_cores: bool = False  # others wait for it, so it may use every core; else its share of them
    idle: Callable[[Mapping[str, Outcome]], bool] = lambda _: False  # whether what went before left it no work
    light: bool = False  # loads no runtime: it may share a process, one after the other, with other light ones
    # Needs that it can do without, and what is called in place of `call` after such an ending of theirs.
    without: Mapping[str, Callable[[Outcome], Call]] = field(default_factory=dict)

    def call_after(self, outcomes: Mapping[str, Outcome]) -> Call:
        """What is called once all needs have ended."""
        failed = (name for name in self.without if not succeeded(outcomes[name]))
        name = next(failed, None)
        return self.call if name is None else self.without[name](outcomes[name])


@dataclass
class Events:
    """What the caller hears while the DAG runs."""

    started: Callable[[Node], None] = lambda node: None
    advanced: Callable[[Node, int], None] = lambda node, amount: None
    ended: Callable[[Node, Outcome], None] = lambda node, outcome: None


class StepError(RuntimeError):
    """A step without which there is no run did not succeed, and not for what the user gave; one line with its cause."""


def value_of(name: str, outcomes: Mapping[str, Outcome]) -> Any:
    """What a step returned; raises its InputError where it has one, else StepError."""
    outcome = outcomes[name]
    if outcome.error is not None:
        raise outcome.error
    if not succeeded(outcome):
        raise StepError(f"the step {name} did not succeed: {outcome.reason}")
    return outcome.value


def succeeded(outcome: Outcome) -> bool:
    """Whether a node has a value to go on with."""
    return outcome.error is None and outcome.failure is None
