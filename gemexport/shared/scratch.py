"""Where temporary files go: those of a step beside the output, for they may be as large as a model."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

FOLDER = "tmp"  # in the work folder; of a run that was killed it is removed by the next
_everybodys: str | None = None  # the folder for temporary files before `use`


def use(folder: Path) -> None:
    """Have this process, its libraries and its children put their temporary files into `folder`, which is made."""
    global _everybodys  # noqa: PLW0603 - a process has one such folder
    if _everybodys is None:
        _everybodys = tempfile.gettempdir()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder.absolute())


def keep_log(name: str, text: str) -> Path:
    """Leave what a program printed where it outlives the run, and the output folder with it; returns the file."""
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"gemexport-{name}-", suffix=".log", delete=False, dir=_everybodys, encoding="utf-8"
    ) as log:
        log.write(text)
    return Path(log.name)
