"""tokenizer.json read: as fast as 33 MB of JSON can be, and never into more memory than a limit."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from gemexport.formats.assets.tables import check_types
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.reading import check_containers, read_bytes

BYTES = 96 << 20  # Gemma's has 33 MB


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector still: where millions of small objects are made, it looks at all of them each time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_tokenizer(path: Path) -> dict[str, Any]:
    """tokenizer.json as a dictionary; InputError when it is not one."""
    try:
        # 33 MB of JSON, of which hardly a string comes twice: pydantic's parser takes a third as long as Python's.
        with uncollected():
            tokenizer = from_json(_tokenizer_bytes(path), cache_strings="none")
    except (ValueError, OSError) as error:
        raise InputError(path, "is not a tokenizer of the tokenizers library", "save the tokenizer again") from error
    check_types(path, tokenizer)
    return dict(tokenizer)


def _tokenizer_bytes(path: Path) -> bytes:
    """All of a tokenizer.json; InputError for one that is larger than any is."""
    data = read_bytes(path, BYTES)
    check_containers(path, data)
    return data
