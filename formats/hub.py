"""Names of models on the Hugging Face Hub, as people write them: what is met with the line that downloads it."""

from __future__ import annotations

import re
from pathlib import Path

# A page's address (of which a path has one slash), huggingface_hub's own scheme, or an id, with or without a revision.
_NAMED = re.compile(
    r"(?P<place>(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:/+)?"
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:(?:@|/(?:tree|blob|resolve)/)(?P<revision>[\w.-]+)(?:/.*)?)?/?"
)


def download(path: Path) -> str | None:
    """What to do where `path` is not there but names a model of the Hub; None where it does not.

    An id alone may be a path that is wrong: where its first folder is there, it is one.
    """
    found = _NAMED.fullmatch(path.as_posix())
    if found is None or (found["place"] is None and path.parent.exists()):
        return None
    name = found["id"].rpartition("/")[2]
    revision = f" --revision {found['revision']}" if found["revision"] else ""
    return f"if it is a model of the Hub, hf download {found['id']}{revision} --local-dir {name}, and give {name}"
