"""The output folder: whose it is, and what of an earlier run can be kept."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout
from pydantic import BaseModel, ConfigDict

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import PARTIAL, abandon_all, atomic, explained, locked, remove
from gemexport.shared import scratch
from gemexport.shared.place import FLEETING, GRIDS, RANGES, SOURCE, VECTORS, WORK

OWNER = "model.json"
LOCK = "lock"  # held by the run that writes
JUST_MADE = 60  # seconds


class Owner(BaseModel):
    """The model that an output folder belongs to."""

    model_config = ConfigDict(frozen=True)

    name: str
    identity: str


def identity(checkpoint: Checkpoint) -> str:
    """A digest of what makes it this model whatever its weights: name, decoder, names and shapes, the adapter."""
    parts: dict[str, Any] = {
        "name": checkpoint.name,
        "architecture": checkpoint.architecture.model_dump(mode="json"),
        "tensors": {name: list(tensor.shape) for name, tensor in checkpoint.tensors.items()},
    }
    if checkpoint.adapter is not None:
        parts["adapter"] = checkpoint.adapter
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def claim(out: Path, checkpoint: Checkpoint, fresh: bool) -> Iterator[Path]:
    """Make `out` this model's, and this process's until the block ends; yields the folder for intermediate files in it.

    Raises InputError, having written nothing, when the folder cannot be written, holds another model's artefacts and is
    not to be begun `fresh`, or is another run's.
    """
    owner = Owner(name=checkpoint.name, identity=identity(checkpoint))
    work = out / WORK
    marker = work / OWNER
    if marker.is_file():
        if not fresh:
            _check_owner(out, marker, owner)
    elif out.is_dir() and any(path != work for path in out.iterdir()):
        raise InputError(out, "is not empty and not an output folder of gemexport", "choose another folder with -o")
    elif out.exists() and not out.is_dir():
        raise InputError(out, "is a file", "choose another folder with -o")
    _make(work)
    with ExitStack() as held:
        try:
            held.enter_context(locked(work / LOCK, wait=False))
        except Timeout as error:
            raise InputError(
                out, "another run is writing there", "wait for its end, or choose another folder"
            ) from error
        except OSError as error:
            raise explained(error, work / LOCK) from error
        if fresh:
            forget(work)
        partial_sources, fleeting = (work / SOURCE).glob(f"*{PARTIAL}"), [work / name for name in FLEETING]
        for left in [*partial_sources, *fleeting, work / scratch.FOLDER]:  # by a run that was killed
            remove(left)
        for folder in (out, *(path for path in out.iterdir() if path.is_dir() and path != work)):
            abandon_all(folder)
        with atomic(marker) as partial:
            partial.write_text(owner.model_dump_json(indent=1) + "\n", "utf-8")
        yield work


def _check_owner(out: Path, marker: Path, owner: Owner) -> None:
    remedy = "choose another folder with -o, or have this one with --fresh"
    try:
        found = Owner.model_validate_json(marker.read_text("utf-8"))
    except ValueError as error:
        raise InputError(marker, "is damaged", remedy) from error
    if found.identity != owner.identity:
        raise InputError(out, f"holds the artefacts of another model ({found.name})", remedy)


def forget(work: Path) -> None:
    """Remove what an earlier run found out about the checkpoint."""
    for name in (GRIDS, VECTORS, RANGES, SOURCE, "compressed"):
        remove(work / name)


@contextmanager
def work_beside(artifact: Path) -> Iterator[Path]:
    """A folder for what judging leaves on the way, as large as a model: beside the artefact, or where we are.

    It is removed when the block ends, and with it those that killed processes left there. InputError where neither
    place can be written.
    """
    place = next((folder for folder in (artifact.parent, Path.cwd()) if os.access(folder, os.W_OK)), None)
    if place is None:
        raise InputError(artifact.parent, "cannot be written, nor can the current folder", "go to one that can")
    for left in place.glob(f"{WORK}-*"):
        _remove_abandoned(left)
    with tempfile.TemporaryDirectory(prefix=f"{WORK}-", dir=place) as folder, locked(Path(folder) / LOCK):
        yield Path(folder)


def _remove_abandoned(folder: Path) -> None:
    """Remove a work folder unless a process has it: that one holds its lock, or has only just made it."""
    with suppress(Timeout, OSError):  # it is another's, or gone by now
        if time.time() - folder.stat().st_mtime > JUST_MADE:
            with locked(folder / LOCK, wait=False):
                remove(folder)


def _make(folder: Path) -> None:
    """Create `folder` with its parents; what was created is removed again when one of them cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explained(error, folder) from error
    if not os.access(folder, os.W_OK):
        raise InputError(folder, "cannot be written (permission denied)", "choose another folder with -o")
