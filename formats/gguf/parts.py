"""A GGUF model in one file or in several, `NAME-00001-of-00003.gguf` and so on, as llama.cpp's gguf-split makes them.

The first part has all metadata; each has a table of its own tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import Keys

from gemexport.formats.gguf.container import MENDED, Container, Description, read
from gemexport.formats.storage.errors import InputError

_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True)
class Parts:
    """The files of a model, first part first, and which of them holds each tensor."""

    containers: tuple[Container, ...]
    stored: dict[str, tuple[Container, Description]]

    @property
    def path(self) -> Path:
        """The first file."""
        return self.containers[0].path

    @property
    def metadata(self) -> dict[str, Any]:
        """Keys and values of the model."""
        return self.containers[0].metadata


def read_parts(path: Path) -> Parts:
    """The model that the file at `path` holds, or is a part of; headers only.

    Raises InputError for a broken file, and for parts that are missing or do not belong together.
    """
    path = Path(path)
    given = read(path)
    count = given.metadata.get(Keys.Split.LLM_KV_SPLIT_COUNT, 1)
    if not isinstance(count, int) or count < 0:
        raise InputError(path, f"says that it is one of {count} parts", MENDED)
    # gguf-split writes 0 into the file that it merges parts into (tools/gguf-split/gguf-split.cpp).
    containers = [given] if count < 2 else _siblings(given, count)
    stored: dict[str, tuple[Container, Description]] = {}
    for container in containers:
        for name, description in container.tensors.items():
            if name in stored:
                raise InputError(container.path, f"tensor {name} is in {stored[name][0].path.name} too", MENDED)
            stored[name] = container, description
    total = containers[0].metadata.get(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, len(stored))
    if count > 1 and total != len(stored):
        raise InputError(path, f"the parts have {len(stored)} tensors and should have {total}", MENDED)
    return Parts(tuple(containers), stored)


def _siblings(given: Container, count: int) -> list[Container]:
    """All parts of the model that `given` is a part of."""
    match = _PART.fullmatch(given.path.name)
    if match is None or int(match["count"]) != count:
        remedy = f"give it its name back, NAME-00001-of-{count:05}.gguf"
        raise InputError(given.path, f"is one of {count} parts of a model, but is not called so", remedy)
    parts = []
    for index in range(count):
        path = given.path.with_name(f"{match['name']}-{index + 1:05}-of-{match['count']}{given.path.suffix}")
        if not path.is_file():
            raise InputError(path, f"is missing, one of {count} parts of a model", "download all parts")
        part = read(path)
        said = [part.metadata.get(key) for key in (Keys.Split.LLM_KV_SPLIT_COUNT, Keys.Split.LLM_KV_SPLIT_NO)]
        if said != [count, index]:
            raise InputError(path, f"is not part {index + 1} of {count}, as its name says", MENDED)
        parts.append(part)
    return parts
