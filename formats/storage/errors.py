"""The one exception that a user may cause: it names the file, what is wrong with it and how to mend it."""

from __future__ import annotations

from pathlib import Path


class InputError(Exception):
    """The request or the input is at fault; the command line prints it as one line and exits with status 2."""

    def __init__(self, path: str | Path, problem: str, remedy: str) -> None:
        # What a file says of itself may be quoted in the problem, and may have line breaks.
        super().__init__(" ".join(line.strip() for line in f"{path}: {problem}; {remedy}".splitlines()))
        self.path = str(path)
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str]]:
        # Exceptions cross process borders pickled, and the default would call us with the message alone.
        return InputError, (self.path, self.problem, self.remedy)
