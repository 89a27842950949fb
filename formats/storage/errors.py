"""The one exception that a user may cause: it names the file, what is wrong with it and how to mend it."""

from __future__ import annotations

import unicodedata
from pathlib import Path

# Controls, halves of surrogate pairs (bytes of a name that are no UTF-8), separators of lines and paragraphs.
_UNSHOWN = ("Cc", "Cs", "Zl", "Zp")
_TURNING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # of the direction


def shown(text: str, *, lines: bool = False) -> str:
    """Text as a terminal or a page may have it: what would act on either is written out, `\\x1b[2J`.

    Line feeds too, unless the text has `lines` that are meant as such.
    """
    if text.isprintable():
        return text
    return "".join(letter if _harmless(letter, lines) else _written_out(letter) for letter in text)


def _harmless(letter: str, lines: bool) -> bool:
    if letter == "\n":
        return lines
    return letter == "\t" or (letter not in _TURNING and unicodedata.category(letter) not in _UNSHOWN)


def _written_out(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


class InputError(Exception):
    """The request or the input is at fault; the command line prints it as one line and exits with status 2."""

    def __init__(self, path: str | Path, problem: str, remedy: str) -> None:
        # What a file says of itself may be quoted in the problem, and may have line breaks.
        said = " ".join(line.strip() for line in f"{problem}; {remedy}".splitlines())
        super().__init__(shown(f"{path}: {said}"))
        self.path = str(path)
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str]]:
        # Exceptions cross process borders pickled, and the default would call us with the message alone.
        return type(self), (self.path, self.problem, self.remedy)


class PlaceError(InputError):
    """A place that is written to is at fault, by a full disk, a limit or permissions, and nothing that was read."""
