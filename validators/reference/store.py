"""Logits of the reference, computed once a run for each set of weights and each sequence, and shared by the validators.

Artefacts of one run mostly hold the same numbers in different bytes, so one reference answers for all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from gemexport.formats.storage.files import atomic, locked
from gemexport.formats.tensor import Floats
from gemexport.validators.runtimes.protocol import Runtime, TopLogits


class ReferenceStore:
    """Logits by sequence in `folder`; `make` loads the model, which happens only when some are not there yet."""

    def __init__(self, folder: Path, make: Callable[[], Runtime]) -> None:
        self._folder = folder
        self._make = make
        self._model: Runtime | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def holds(self, sequences: Iterable[Sequence[int]]) -> bool:
        """Whether the logits of all these are there, and no model is needed for them."""
        return all(self._path(tokens).is_file() for tokens in sequences)

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Teacher-forced logits `[len(tokens), vocab]`, mapped."""
        path = self._path(tokens)
        if not path.is_file():
            # Whoever comes second waits here, and then finds the file.
            with locked(self._folder / "lock"):
                if not path.is_file():
                    self._compute(tokens, path)
        mapped: Floats = np.load(path, mmap_mode="r")
        return mapped

    def hidden(self, tokens: Sequence[int]) -> list[Floats]:
        """What goes into the first layer and what each layer gives, `[layers + 1][n, hidden]`; kept by nobody."""
        if self._model is None:
            self._model = self._make()
        found = self._model.hidden(tokens)
        if found is None:
            raise TypeError("a reference shows its layers")
        return found

    def _compute(self, tokens: Sequence[int], path: Path) -> None:
        if self._model is None:
            self._model = self._make()
        logits = self._model.logits(tokens)
        if isinstance(logits, TopLogits):
            raise TypeError("a reference gives whole distributions")
        with atomic(path) as partial, partial.open("wb") as file:
            np.save(file, logits)

    def _path(self, tokens: Sequence[int]) -> Path:
        return self._folder / f"{_digest(tokens)}.npy"

    def close(self) -> None:
        """Let go of the model."""
        if self._model is not None:
            self._model.close()
            self._model = None


def _digest(tokens: Sequence[int]) -> str:
    return hashlib.blake2b(np.asarray(tokens, dtype="<i8").tobytes(), digest_size=12).hexdigest()
