"""What every exporter hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Progress = Callable[[int], None]  # told the source bytes that were done since the last call


def ignore(_: int) -> None:
    """A progress callback for whoever does not watch."""


@dataclass(frozen=True)
class Export:
    """An artefact that was written."""

    path: Path
    variant: str
    run: str  # the command line that users run it with
    notes: list[str] = field(default_factory=list)  # what the format could not hold, one sentence each
    files: list[Path] = field(default_factory=list)  # everything that was written, for checksums
    widths: Mapping[str, int] = field(default_factory=dict)  # weights by what they are stored in, once read back
