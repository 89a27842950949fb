"""Whether a checkpoint's files are still those that were there: a run reads them for hours, each step by itself.

Told by size, time of the last change and inode of what a name leads to, behind links such as the Hub cache's. Reading a
file, linking to it and changing who may read it are no changes.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gemexport.formats import assets
from gemexport.formats.assets import templates
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import INDEX_NAME

ADAPTER = "adapter_config.json"
WEIGHTS = ".safetensors"
NAMES = ("config.json", INDEX_NAME, ADAPTER, templates.OLD_FILE, *assets.FILES)  # that are read beside the weights
_PART = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)
Stamp = tuple[int, int, int]  # bytes, nanoseconds since 1970, inode


class ChangedError(InputError):
    """The checkpoint is another one than when reading began."""


@dataclass(frozen=True)
class Stamps:
    """What tells the files of a checkpoint and its adapter, each a folder or a file, from those that replace them."""

    places: tuple[Path, ...]
    found: dict[Path, Stamp]

    @classmethod
    def of(cls, *places: Path) -> Stamps:
        """That of what is there now; whatever is not there, or cannot be looked at, has none."""
        found = {}
        for path in (file for place in places for file in _files(place)):
            with suppress(OSError):  # who opens it says so
                status = path.stat()
                found[path] = status.st_size, status.st_mtime_ns, status.st_ino
        return cls(places, found)

    def check(self) -> None:
        """Raise ChangedError, naming a file, where what is there now is something else."""
        now = Stamps.of(*self.places).found
        for path in sorted({*self.found, *now}):
            before, after = self.found.get(path), now.get(path)
            if before != after:
                raise ChangedError(path, _difference(before, after), "leave the checkpoint as it is, and start again")


NOTHING = Stamps((), {})


def _files(place: Path) -> Iterator[Path]:
    """What may be read of a folder: weights, settings, templates; a file, and the other parts of a GGUF model."""
    with suppress(OSError):
        if not place.is_dir():
            yield place
            if part := _PART.fullmatch(place.name):
                yield from place.parent.glob(f"{glob.escape(part[1])}-[0-9]*-of-[0-9]*.gguf")
            return
        for entry in os.scandir(place):
            if entry.name in NAMES or entry.name.endswith(WEIGHTS):
                yield place / entry.name
        yield from (place / templates.FOLDER).glob("*.jinja")
        yield from place.glob("[0-9]*_*/*")  # modules of sentence-transformers


def _difference(before: Stamp | None, after: Stamp | None) -> str:
    if before is None or after is None:
        return "appeared while the checkpoint was read" if before is None else "was removed while it was read"
    if before[0] != after[0]:
        return f"was replaced while it was read ({before[0]} bytes before, {after[0]} now)"
    return f"was {'replaced' if before[2] != after[2] else 'written to'} while it was read"
