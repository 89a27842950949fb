"""Logits of the reference, computed once a run for each set of weights and each sequence, and shared by the validators.

Artefacts of one run mostly hold the same numbers in different bytes, so one reference answers for all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
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
    def reference(self) -> Reference:
        return self._make()

    def holds(self, sequences: Iterable[Sequence[int]]) -> bool:
        """Whether the logits of all these are there."""
        return all(self.path(tokens).is_file() for tokens in sequences)

    def compute(
        self, sequences: Sequence[Sequence[int]], progress: Callable[[int], None] = lambda positions: None
    ) -> None:
        """See to it that the logits of all these are there: what is not goes through the layers together.

        Progress in positions, once for each layer and once for the head, of what is computed here.
        """
        compute_together([(self, sequences)], progress)

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Teacher-forced logits `[len(tokens), vocab]`, mapped."""
        self.compute([tokens])
        mapped: Floats = np.load(self.path(tokens), mmap_mode="r")
        return mapped

    def hidden(self, tokens: Sequence[int]) -> Iterator[Floats]:
        """What goes into the first layer and then what each gives, `[n, hidden]`, as it is asked for."""
        return self.reference.hidden(tokens, self.folder)

    def path(self, tokens: Sequence[int]) -> Path:
        """The file of a sequence's logits."""
        return self.folder / f"{_digest(tokens)}.npy"


def compute_together(
    wanted: Sequence[tuple[ReferenceStore, Sequence[Sequence[int]]]],
    progress: Callable[[int], None] = lambda positions: None,
) -> None:
    """`compute` for several stores whose references hold the same tensors, which are read once for all of them."""
    from gemexport.validators.reference import write_together

    if all(store.holds(sequences) for store, sequences in wanted):
        return
    with ExitStack() as held:
        # Whoever comes second waits here, and then finds the files.
        for folder in sorted({store.folder for store, _ in wanted}):
            held.enter_context(locked(folder / "lock"))
        missing: dict[Path, tuple[ReferenceStore, Sequence[int]]] = {}
        for store, sequences in wanted:
            paths = {store.path(tokens): (store, tokens) for tokens in sequences}
            missing |= {path: each for path, each in paths.items() if not path.is_file()}
        by_store: dict[Path, list[Path]] = {}
        for path, (store, _) in missing.items():
            by_store.setdefault(store.folder, []).append(path)
        if by_store:
            write_together(
                [
                    (missing[paths[0]][0].reference, [missing[path][1] for path in paths], paths)
                    for paths in by_store.values()
                ],
                progress,
            )


def _digest(tokens: Sequence[int]) -> str:
    return hashlib.blake2b(np.asarray(tokens, dtype="<i8").tobytes(), digest_size=12).hexdigest()
