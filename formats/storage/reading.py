"""Files that other people made, read: regular ones only, whole, and never more of them than a limit.

A FIFO in place of a file would make a reader wait for ever, a device never end, and JSON of nothing but brackets take
thirty times its size in memory. Whatever is mapped instead of read asks `regular` first.
"""

from __future__ import annotations

import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from gemexport.formats.storage.errors import InputError

JSON_BYTES = 32 << 20  # a config or an index of shards: the largest known have a few megabytes
TEXT_BYTES = 4 << 20  # a chat template: the largest known have some 20 kB
MAX_CONTAINERS = 1 << 21  # lists and objects of one JSON file; the tokenizer of Gemma has half a million
AGAIN = "download or save the file again"
_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


def regular(path: Path, limit: int | None = None) -> int:
    """The size of a file in bytes; links are followed.

    Raises InputError for what is no regular file, cannot be looked at, or is larger than `limit`; FileNotFoundError
    where there is nothing.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise InputError(path, "is a link to nothing", AGAIN) from error
        raise
    except (OSError, ValueError) as error:  # a name too long, links in a circle, a folder that is closed
        raise InputError(path, f"cannot be read ({_reason(error)})", AGAIN) from error
    return _checked(path, found, limit)


def opened(path: Path, limit: int | None = None) -> BufferedReader:
    """A file to read bytes from; raises as `regular`."""
    regular(path, limit)
    try:
        # Should it have become a FIFO in between, this does not wait for a writer.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(path, f"cannot be read ({_reason(error)})", AGAIN) from error
    try:
        _checked(path, os.fstat(file.fileno()), limit)
    except InputError:
        file.close()
        raise
    return file


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes; raises as `regular`."""
    with opened(path, limit) as file:
        try:
            # Not `limit`: Python allocates what is asked for, a hundred megabytes for a tokenizer of three.
            return file.read(os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise InputError(path, f"cannot be read ({_reason(error)})", AGAIN) from error


def read_text(path: Path, limit: int = TEXT_BYTES) -> str:
    """The content of a file in UTF-8, at most `limit` bytes; raises as `regular`, InputError for no text."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(path, "is no text in UTF-8", AGAIN) from error


def read_json(path: Path, remedy: str = AGAIN, limit: int = JSON_BYTES) -> dict[str, Any]:
    """A JSON object in a file of at most `limit` bytes; raises as `regular`, and InputError for anything else."""
    data = read_bytes(path, limit)
    check_containers(path, data)
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(path, f"cannot be read as JSON ({error})", remedy) from error
    if not isinstance(found, dict):
        raise InputError(path, "is not a JSON object", remedy)
    return found


def read_optional_json(path: Path, remedy: str = AGAIN) -> dict[str, Any]:
    """As `read_json`, empty where there is no such file."""
    try:
        return read_json(path, remedy)
    except FileNotFoundError:
        return {}


def check_containers(path: Path, data: bytes) -> None:
    """Raise InputError for JSON that makes more objects than fit into memory, by a count of its brackets."""
    count = data.count(b"[") + data.count(b"{")
    if count > MAX_CONTAINERS:
        raise InputError(path, f"has {count} lists and objects in it", AGAIN)


def copy(source: Path, target: Path) -> None:
    """Write what is in the file `source` to `target`; raises as `regular`."""
    with opened(source) as file, target.open("wb") as out:
        while data := file.read(1 << 20):
            out.write(data)


def _checked(path: Path, found: os.stat_result, limit: int | None) -> int:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "thing of its own")
        raise InputError(path, f"is a {kind} and should be a file", AGAIN)
    if limit is not None and found.st_size > limit:
        raise InputError(path, f"has {found.st_size} bytes, more than the {limit} that are read of such a file", AGAIN)
    return found.st_size


def _reason(error: Exception) -> str:
    return os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else str(error)
