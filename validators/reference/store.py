"""Logits of the reference, computed once a run for each set of weights and each sequence, and shared by the validators.

Artefacts of one run mostly hold the same numbers in different bytes, so one reference answers for all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemexport.formats.storage.files import locked
from gemexport.formats.tensor import Floats

if TYPE_CHECKING:
    from gemexport.validators.reference import Reference


class ReferenceStore:
    """Logits by sequence in `folder`; `make` gives the reference, which is wanted only when some are not there yet."""

    def __init__(self, folder: Path, make: Callable[[], Reference]) -> None:
        self.folder = folder
        self._make = make
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def _reference(self) -> Reference:
        return self._make()

    def holds(self, sequences: Iterable[Sequence[int]]) -> bool:
        """Whether the logits of all these are there."""
        return all(self._path(tokens).is_file() for tokens in sequences)

    def compute(
        self, sequences: Sequence[Sequence[int]], progress: Callable[[int], None] = lambda positions: None
    ) -> None:
        """See to it that the logits of all these are there: what is not goes through the layers together.

        Progress in positions, once for each layer and once for the head, of what is computed here.
        """
        if self.holds(sequences):
            return
        # Whoever comes second waits here, and then finds the files.
        with locked(self.folder / "lock"):
            missing = {self._path(tokens): tokens for tokens in sequences if not self._path(tokens).is_file()}
            if missing:
                self._reference.write_logits([*missing.values()], [*missing], progress)

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Teacher-forced logits `[len(tokens), vocab]`, mapped."""
        self.compute([tokens])
        mapped: Floats = np.load(self._path(tokens), mmap_mode="r")
        return mapped

    def hidden(self, tokens: Sequence[int]) -> Iterator[Floats]:
        """What goes into the first layer and then what each gives, `[n, hidden]`, as it is asked for."""
        return self._reference.hidden(tokens, self.folder)

    def _path(self, tokens: Sequence[int]) -> Path:
        return self.folder / f"{_digest(tokens)}.npy"


def _digest(tokens: Sequence[int]) -> str:
    return hashlib.blake2b(np.asarray(tokens, dtype="<i8").tobytes(), digest_size=12).hexdigest()
