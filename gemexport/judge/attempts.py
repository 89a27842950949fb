"""The parts of one verdict, each tried by itself: one that cannot be judged leaves the others as they are."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

from gemexport.formats.storage.errors import InputError, PlaceError
from gemexport.shared.measured import UnjudgedReport

Found = TypeVar("Found")


class Attempts:
    """Keeps what was not judged, with the reason."""

    def __init__(self) -> None:
        self._unjudged: list[UnjudgedReport] = []

    @property
    def unjudged(self) -> tuple[UnjudgedReport, ...]:
        """What was not judged so far."""
        return tuple(self._unjudged)

    def leave_out(self, part: str, reason: str) -> None:
        """This part is not tried at all."""
        self._unjudged.append(UnjudgedReport(part=part, because="left out", reason=reason))

    def fail(self, part: str, reason: str) -> None:
        """This part is not tried, since what it rests on crashed."""
        self._unjudged.append(UnjudgedReport(part=part, because="crashed", reason=reason))

    def make(self, part: str, attempt: Callable[[], Found]) -> Found | None:
        """What `attempt` returns; None where it raises, which is kept as this part's ending.

        An InputError is what is wrong with the artefact, but for one of a place that is written to; anything else is a
        fault of what judges it: its traceback goes where the step prints.
        """
        try:
            return attempt()
        except PlaceError as error:
            self.fail(part, f"{error.problem}; {error.remedy}")
        except InputError as error:
            reason = f"{error.problem}; {error.remedy}"
            self._unjudged.append(UnjudgedReport(part=part, because="refused", reason=reason))
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._unjudged.append(UnjudgedReport(part=part, because="crashed", reason=reason))
        return None
