"""The line that installs what is missing, as it works where gemexport came from: a clone, a file or an index."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any
from urllib.parse import urlsplit


def install(*extras: str) -> str:
    """The command that installs these extras of gemexport for the interpreter that runs."""
    from importlib.metadata import distribution  # which every command would wait for

    origin = json.loads(distribution("gemexport").read_text("direct_url.json") or "{}")  # PEP 610
    return f"{shlex.quote(sys.executable)} -m pip install {shlex.quote(requirement(origin, ','.join(extras)))}"


def requirement(origin: dict[str, Any], extras: str) -> str:
    """What pip is to be asked for, by where it got gemexport from (PEP 610); from an index where nothing is said."""
    url = str(origin.get("url", ""))
    if "dir_info" in origin and url.startswith("file:"):
        from urllib.request import url2pathname  # this one too: it loads what speaks HTTP

        return f"{url2pathname(urlsplit(url).path)}[{extras}]"
    if "vcs_info" in origin:
        made_of = origin["vcs_info"]
        return f"gemexport[{extras}] @ {made_of['vcs']}+{url}@{made_of['commit_id']}"
    return f"gemexport[{extras}] @ {url}" if url else f"gemexport[{extras}]"
