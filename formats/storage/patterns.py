"""Regular expressions out of other people's files: of a limited length, and with a limited time to match in.

Python's own would take years for `(a+)+b` against forty letters, and cannot be stopped.
"""

from __future__ import annotations

import time
from pathlib import Path

import regex

from gemexport.formats.storage.errors import InputError

MAX_LENGTH = 1 << 14  # characters of one
MAX_PATTERNS = 1 << 12  # of one setting: a model has some hundreds of matrices
SECONDS = 0.5  # of computing, for all that one pattern is asked
MAX_REPEATS = 10_000  # of all counted repetitions multiplied, should they be nested: they are unrolled in memory
_COUNTED = regex.compile(r"\{(\d{0,9})\d*(?:,(\d{0,9})\d*)?\}")


class Pattern:
    """A regular expression of the setting `where` in the file `path`.

    Raises InputError when it is none, is too large to compile, or takes too long to match.
    """

    def __init__(self, text: str, path: Path, where: str, remedy: str) -> None:
        self._path, self._where, self._remedy = path, f"{where} has the pattern {_shown(text)}, which", remedy
        self._left = SECONDS
        if len(text) > MAX_LENGTH or _repeats(text) > MAX_REPEATS:
            raise self._wrong("is too large")
        try:
            self._pattern = regex.compile(text)
        except (regex.error, OverflowError, RecursionError, ValueError, IndexError, KeyError) as error:
            raise self._wrong(f"is no regular expression ({error})") from error

    def match(self, text: str) -> regex.Match[str] | None:
        """As `re.match`."""
        return self._ask("match", text)

    def search(self, text: str) -> regex.Match[str] | None:
        """As `re.search`."""
        return self._ask("search", text)

    def _ask(self, how: str, text: str) -> regex.Match[str] | None:
        started = time.process_time()
        try:
            found: regex.Match[str] | None = getattr(self._pattern, how)(text, timeout=self._left)
        except (TimeoutError, MemoryError) as error:
            raise self._too_long() from error
        self._left -= time.process_time() - started
        if self._left <= 0:
            raise self._too_long()
        return found

    def _too_long(self) -> InputError:
        return self._wrong(f"takes more than {SECONDS} s to match")

    def _wrong(self, problem: str) -> InputError:
        return InputError(self._path, f"{self._where} {problem}", self._remedy)


def _repeats(text: str) -> int:
    """How often the innermost part of a pattern is repeated, were its counted repetitions all nested."""
    total = 1
    for counted in _COUNTED.finditer(text):
        total *= max(1, *(int(count or 0) for count in counted.groups(default="0")))
        if total > MAX_REPEATS:
            break
    return total


def _shown(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"
