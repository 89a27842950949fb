"""The one question that a format answers for a whole model: does its program run it?

Every exporter has `supports(model, variant)` beside `container`: None, or why not, in a sentence. `gemexport plan`
shows it, and `export` refuses such a model before it writes anything.
"""

from __future__ import annotations

import math

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.model import Model
from gemexport.formats.gemma.roles import Kind
from gemexport.formats.storage.errors import InputError


def require(checkpoint: Checkpoint, reason: str | None, target: str) -> None:
    """Raise InputError for a model that a format does not support, for this reason."""
    if reason is not None:
        raise refusal(checkpoint, reason, target)


def refusal(checkpoint: Checkpoint, reason: str, target: str) -> InputError:
    """The error for a model that a format does not support."""
    return InputError(checkpoint.path, reason, f"leave this format out (--skip {target})")


def experts(model: Model) -> str | None:
    """Why a format that holds dense decoders alone does not hold this one."""
    return "it has experts" if model.decoder.experts else None


def streams(model: Model) -> str | None:
    """Why a format that holds layers of one stream alone does not hold this one."""
    return "its layers have several streams" if model.decoder.streams else None


def embeddings(model: Model) -> str | None:
    """Why a format that holds decoders alone does not hold a model that makes one vector of a text."""
    return "it makes one vector of a text, not logits" if model.embedder else None


def all_computed(model: Model) -> list[str]:
    """A sentence about what it costs where every position goes through all experts; none of a dense decoder."""
    experts = model.decoder.experts
    if experts is None:
        return []
    sizes = [(math.prod(spec.shape), spec.role.kind) for spec in model.specs.values() if not spec.role.is_looked_up]
    of_experts = sum(size for size, kind in sizes if kind is Kind.EXPERT)
    rest = sum(size for size, _ in sizes) - of_experts
    times = (rest + of_experts) / (rest + of_experts * experts.top_k / experts.count)
    shares = f"all {experts.count} experts, not the {experts.top_k} that it chooses"
    return [f"every position goes through {shares}: {times:.1f} times the multiplications of the layers"]
