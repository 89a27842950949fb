"""The first step of judging an artefact that lies there: whether it can be read, and is of this model at all."""

from __future__ import annotations

from pathlib import Path

from gemexport.formats.storage.errors import InputError
from gemexport.registry import TARGETS
from gemexport.shared.place import Place, Progress


def open_artifact(place: Place, target: str, path: Path, progress: Progress) -> None:
    """Read what an artefact says that it holds; no weight of it is read, and nothing is computed.

    Raises InputError for one that is damaged, and for one of which most tensors are not the checkpoint's, by name and
    shape: it is another model's. Single tensors that are missing or of another shape are for the verdict to name.
    """
    wanted, stored = place.checkpoint().tensors, TARGETS[target].reader().tensors(path)
    there = [name for name in wanted if name in stored]
    other = [name for name in there if stored[name].shape != wanted[name].shape]
    if 2 * (len(there) - len(other)) >= len(wanted):
        return
    problem = f"is another model's: it has {len(there)} of the {len(wanted)} tensors of {place.model}"
    if other:
        shapes = f"{list(stored[other[0]].shape)} and not {list(wanted[other[0]].shape)}"
        problem += f", {len(other)} of these in another shape ({other[0]} is {shapes})"
    raise InputError(path, problem, "give the checkpoint that it was made from")
