"""An artefact as its exporter is asked for it: what a node is given, and nothing that takes long to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemexport.formats.checkpoint import Checkpoint
from gemexport.registry import TARGETS


@dataclass(frozen=True)
class Artefact:
    """One that widths are chosen for, as its exporter is asked for it."""

    target: str
    variant: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits of codes that it holds as narrow as they are."""
        return TARGETS[self.target].widths(self.variant)

    def size(self, checkpoint: Checkpoint) -> int:
        """Its bytes."""
        return int(TARGETS[self.target].exporter().size(checkpoint, variant=self.variant, **self.options))

    def __str__(self) -> str:
        return f"{self.target}:{self.variant}"
