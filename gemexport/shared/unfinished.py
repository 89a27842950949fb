"""What a validator had found when a program took its process along: kept in the work folder before each that may."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

from gemexport.formats.storage.files import atomic
from gemexport.shared.measured import UnjudgedReport, Validation
from gemexport.shared.place import JUDGED


@dataclass(frozen=True)
class Unfinished:
    """The place of one artefact's findings; pickled, as they are on their way between processes."""

    file: Path

    @classmethod
    def of(cls, work: Path, artifact: Path) -> Unfinished:
        """That of the artefact at this path."""
        return cls(work / JUDGED / hashlib.sha256(bytes(artifact.absolute())).hexdigest()[:24])

    def forget(self) -> None:
        """Remove what an earlier validation left."""
        self.file.unlink(missing_ok=True)

    def keep(self, found: Validation, trying: tuple[str, ...]) -> None:
        """Keep what was found, and the parts that are tried from here on."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(self.file) as partial:
            partial.write_bytes(pickle.dumps((found, trying)))

    def ended(self, reason: str) -> Validation | None:
        """What was found by a validator that ended for this reason, the parts it was at being crashed.

        None where it had not found anything.
        """
        if not self.file.is_file():
            return None
        found: Validation
        found, trying = pickle.loads(self.file.read_bytes())
        crashed = (UnjudgedReport(part=part, because="crashed", reason=reason) for part in trying)
        return replace(found, unjudged=(*found.unjudged, *crashed))
