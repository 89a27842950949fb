"""Sentences of the report that are no verdict: what happened to the model before, and where a runtime errs itself."""

from __future__ import annotations

import re
from collections import Counter

from gemexport.compress import Compression
from gemexport.formats.grids.recipe import Recipe
from gemexport.formats.grids.search import GridIndex
from gemexport.shared.measured import ChatReport, TokenizerReport
from gemexport.shared.node import Outcome


def compression_note(asked: Compression, recipe: Recipe, outcome: Outcome) -> str:
    """What llm-compressor did."""
    scheme = recipe.linear
    assert scheme is not None
    done = f"llm-compressor {outcome.value} quantized the linears ({asked.method}, {scheme.bits} bit, groups of"
    return f"{done} {scheme.group_size}); the loss is against the model before that"


def left_notes(index: GridIndex) -> list[str]:
    """A sentence about the matrices that an adapter took off their lattice, if any; layers are counted, not named."""
    left = [record for record in index.tensors if record.left]
    kinds = Counter(re.sub(r"\.\d+\.", ".*.", record.name) for record in left)
    if not left:
        return []
    named = ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items())
    plain = sum(record.bits is None for record in left)
    becomes = "the recipe quantized them anew" if not plain else f"{plain} of them stay plain, as the recipe says"
    return [f"the merge left the lattice: {len(left)} matrices that lay on one do no more; {becomes}: {named}"]


def wording_notes(found: TokenizerReport | None, talked: ChatReport | None) -> tuple[str, ...]:
    """A sentence where a runtime errs with an artefact that is right."""
    result = []
    if found is not None and found.runtime_only:
        shown = next(item for item in found.differences if item.runtime)
        result.append(
            f"{found.name} tokenizes {found.runtime_only} of {found.texts} texts differently from the checkpoint, with "
            f"tables that give the checkpoint's tokens: {shown.text!r} is {_some(shown.found)} instead of "
            f"{_some(shown.expected)}"
        )
    if talked is not None and talked.runtime_only:
        which = ", ".join(item.conversation for item in talked.differences if item.runtime)
        result.append(f"{talked.engine} lays out conversations differently with the checkpoint's own template: {which}")
    return tuple(result)


def _some(ids: tuple[int, ...], limit: int = 8) -> str:
    return f"[{', '.join(map(str, ids[:limit]))}{', …' if len(ids) > limit else ''}]"
