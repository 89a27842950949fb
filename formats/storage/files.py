"""Outputs that appear under their name only when they are whole: written beside, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gemexport.formats.storage.errors import PlaceError

if TYPE_CHECKING:
    from filelock import FileLock

PARTIAL = ".partial"
OLD = ".old"  # before that, of what is being replaced
LOCK = "lock"  # file in a folder of folders that are made once
_REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def remove(path: Path) -> None:
    """Delete a file or a folder; nothing happens when there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or a folder to; it takes the name `path` when the block ends well.

    On an error what was written is removed and an older `path` stays as it was. Raises InputError when the folder
    cannot be written or the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        abandon(path)
        yield partial
        if path.is_dir() and not path.is_symlink():
            old = path.with_name(f"{path.name}{OLD}{PARTIAL}")
            os.replace(path, old)
            os.replace(partial, path)
            remove(old)
        else:
            os.replace(partial, path)
    except OSError as error:
        _remove_quietly(partial)
        raise explained(error, path) from error
    except BaseException:
        _remove_quietly(partial)
        raise


def abandon_all(folder: Path) -> None:
    """`abandon` whatever processes that are gone left in a folder; nothing happens where there is none."""
    for left in sorted(folder.glob(f"*{PARTIAL}")):
        abandon(left.with_name(left.name.removesuffix(PARTIAL).removesuffix(OLD)))


def abandon(path: Path) -> None:
    """Remove what a process that is gone left of an `atomic` for `path`; what it was about to replace is back."""
    old = path.with_name(f"{path.name}{OLD}{PARTIAL}")
    if old.exists() and not path.exists():
        os.replace(old, path)
    for left in (old, path.with_name(f"{path.name}{PARTIAL}")):
        _remove_quietly(left)


def locked(path: Path, *, wait: bool = True) -> FileLock:
    """A lock to enter: the file `path`, in a folder that there is, to oneself; another process that wants it waits.

    filelock.Timeout on entering for one that does not want to `wait`.
    """
    from filelock import FileLock

    return FileLock(path, blocking=wait)


def _remove_quietly(path: Path) -> None:
    # The error that brought us here matters more than a leftover that the next run removes.
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def explained(error: OSError, path: Path) -> Exception:
    """A PlaceError for the system errors that a user can mend (full disk, permissions), else `error` itself."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PlaceError(path, "the disk is full", "free some space, or choose another folder with -o")
    if error.errno == errno.EFBIG:
        return PlaceError(path, "is larger than a file may be here", "see `ulimit -f`, or choose another folder")
    if error.errno in _REFUSED:
        reason = os.strerror(error.errno).lower()
        return PlaceError(path, f"cannot be written ({reason})", "choose another folder with -o")
    return error


def write_whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` with what `fill` writes, whole or not at all, and remove others beside it.

    Whoever wants the same one at that time waits, and has it. Raises InputError when the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / LOCK):
            if not folder.is_dir():
                _fill(folder, fill)
    except OSError as error:
        raise explained(error, folder) from error


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", suffix=PARTIAL, dir=folder.parent))
    try:
        fill(partial)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in folder.parent.iterdir():
        if old != folder and old.name != LOCK:
            shutil.rmtree(old, ignore_errors=True)
