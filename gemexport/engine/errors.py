"""What ends a run that no user can mend."""

from __future__ import annotations


class StepError(RuntimeError):
    """A step without which there is no run did not succeed, and not for what the user gave; one line with its cause."""
