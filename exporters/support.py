"""The one question that a format answers for a whole model: does its program run it?

Every exporter has `supports(model, variant)` beside `container`: None, or why not, in a sentence. `gemexport plan`
shows it, and `export` refuses such a model before it writes anything.
"""

from __future__ import annotations

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.model import Model
from gemexport.formats.storage.errors import InputError


def require(checkpoint: Checkpoint, reason: str | None, target: str) -> None:
    """Raise InputError for a model that a format does not support, for this reason."""
    if reason is not None:
        raise InputError(checkpoint.path, reason, f"leave this format out (--skip {target})")


def experts(model: Model) -> str | None:
    """Why a format that holds dense decoders alone does not hold this one."""
    return "it has experts" if model.decoder.experts else None
