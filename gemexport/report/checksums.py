"""The files of artefacts and their checksums, as `sha256sum -c` reads them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gemexport.formats import assets
from gemexport.report.schema import ArtifactReport, FileReport, write_text

SUMS = "SHA256SUMS"


def describe_files(root: Path, path: Path) -> tuple[FileReport, ...]:
    """The files of the artefact at `path` (a file or a folder) and those beside it that are part of it, sorted.

    Their paths are relative to `root`.
    """
    found = []
    for file in _files(path):
        relative = Path(os.path.relpath(file, root)).as_posix()
        found.append(FileReport(path=relative, bytes=file.stat().st_size, sha256=file_sha256(file)))
    return tuple(found)


def artifact_sha256(files: Sequence[FileReport]) -> str:
    """One digest for an artefact: a file's own, or for a folder that of its lines in `SHA256SUMS`."""
    if len(files) == 1:
        return files[0].sha256
    return hashlib.sha256("".join(_sum_line(file) for file in files).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read a slice at a time."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_sums(out: Path, artifacts: Iterable[ArtifactReport]) -> Path:
    """Write `SHA256SUMS`, as `sha256sum -c` reads it, for every file of the artefacts; return its path.

    The reports are not in it: they hold measured seconds, and without them two builds of the same model have
    the same `SHA256SUMS`.
    """
    files = {file.path: file for artifact in artifacts for file in artifact.files}
    return write_text(out / SUMS, "".join(_sum_line(files[path]) for path in sorted(files)))


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    found = [*(file for file in path.rglob("*") if file.is_file()), *assets.beside(path)]
    yield from sorted(found, key=lambda file: file.as_posix())


def _sum_line(file: FileReport) -> str:
    # coreutils marks a line whose name holds a backslash or a line break with a leading backslash.
    name = file.path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "\\" if name != file.path else ""
    return f"{mark}{file.sha256}  {name}\n"
