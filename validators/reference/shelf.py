"""Tensors that wait on disk: what one layer gave, until the next one is read."""

from __future__ import annotations

from collections import UserDict
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from gemexport.formats.storage.files import explained


class Shelf:
    """Tensors by name in `folder`, which is there and whose files are the shelf's own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, name: str, *tensors: torch.Tensor | None) -> None:
        """Keep these, in their dtype and strides, in place of what had the name; PlaceError where there is no room."""
        # A view is saved with all that it is a view of.
        kept = [None if tensor is None else tensor.clone() for tensor in tensors]
        path = self._folder / name
        try:
            torch.save(kept, path)
        except RuntimeError:  # its stream does not say why it cannot write; a file does
            whole = BytesIO()
            torch.save(kept, whole)
            path.unlink(missing_ok=True)
            try:
                path.write_bytes(whole.getbuffer())
            except OSError as error:
                raise explained(error, path) from error

    def get(self, name: str) -> list[Any]:
        """What was kept under the name, an empty list for nothing."""
        path = self._folder / name
        found: list[Any] = torch.load(path, weights_only=True) if path.is_file() else []
        return found

    def drop(self, name: str) -> None:
        """Forget it; nothing happens when nothing has the name."""
        (self._folder / name).unlink(missing_ok=True)


class SharedStates(UserDict[str, Any]):
    """The keys and values that a sequence's later layers read, by the type of attention, on a shelf.

    It takes the place of transformers' `KVSharingDict`.
    """

    def __init__(self, shelf: Shelf, sequence: int) -> None:
        super().__init__()
        self._shelf, self._sequence = shelf, sequence

    def __getitem__(self, kind: str) -> Any:
        found = self._shelf.get(self._name(kind))
        if not found:
            raise KeyError(kind)
        return tuple(found)

    def __setitem__(self, kind: str, states: Any) -> None:
        self._shelf.put(self._name(kind), *states)

    def _name(self, kind: str) -> str:
        return f"states-{self._sequence}-{kind}"
