"""What a checkpoint's settings were judged and composed to, kept for the next command that meets the same ones.

A tokenizer of 33 MB takes a second of a processor to read and judge, and a twentieth of that to tell that it is the one
that was judged before. The name of what is kept is a digest of all that was read, so nothing in it grows old.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from gemexport.formats import assets
from gemexport.formats.assets import reading, templates
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import PARTIAL
from gemexport.formats.storage.reading import opened, read_bytes

WHERE = "GEMEXPORT_CACHE"  # environment variable: a folder; empty for none
BYTES = 1 << 20  # of what is kept for a checkpoint: templates and settings, never a tokenizer
_COMPOSED = TypeAdapter(assets.Composed)


def composed(folder: Path, decoder: assets.Decoder, read: Sequence[str]) -> assets.Composed:
    """`assets.compose` of a folder's files, or what it said of the same ones before."""
    if (place := _place()) is None:
        return _made(folder, decoder, read)
    path = place / f"{_digest(folder, decoder, read)}.json"
    # What cannot be read here is made again, and what cannot be kept is not: it is nothing but time.
    with suppress(OSError, InputError, ValidationError):
        return _COMPOSED.validate_json(read_bytes(path, BYTES))
    found = _made(folder, decoder, read)
    if assets.TOKENIZER not in found.files:
        with suppress(OSError):
            _keep(path, _COMPOSED.dump_json(found))
    return found


def _made(folder: Path, decoder: assets.Decoder, read: Sequence[str]) -> assets.Composed:
    with reading.uncollected():
        return assets.compose(folder, reading.read_tokenizer(folder / assets.TOKENIZER), decoder, read)


def _place() -> Path | None:
    """The folder for it; None where the user wants none."""
    said = os.environ.get(WHERE)
    if said is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base) / "gemexport" / "settings"
    return Path(said) / "settings" if said else None


def _keep(path: Path, data: bytes) -> None:
    """Write a file that others may read or write at this moment."""
    if len(data) > BYTES:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=PARTIAL)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _digest(folder: Path, decoder: assets.Decoder, read: Sequence[str]) -> str:
    """A name for all that `assets.compose` looks at: names in the folder, contents of the files that it reads."""
    entries = sorted((entry.name, entry.is_dir()) for entry in os.scandir(folder))
    asked = json.dumps([assets.VERSION, asdict(decoder), sorted(read), entries])
    digest = hashlib.sha256(asked.encode("utf-8", "surrogateescape"))
    # Our own sources too: what is judged and composed is another thing when they change.
    for path in (*sorted(Path(__file__).parent.glob("*.py")), *_files(folder)):
        with opened(path, reading.BYTES) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"\n{path.name} {found}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for name in (*assets.FILES, templates.OLD_FILE):
        if (folder / name).exists():
            yield folder / name
    yield from sorted((folder / templates.FOLDER).glob("*.jinja"))
