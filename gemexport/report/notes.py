"""Sentences of the report that are no verdict: what happened to the model before, and where a runtime errs itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from gemexport.compress import Compression
from gemexport.formats.grids.recipe import Recipe, is_linear
from gemexport.formats.grids.search import GridIndex, GridRecord
from gemexport.shared.measured import Allocated, ChatReport, Rounded, TokenizerReport, WeightsReport
from gemexport.shared.node import Outcome


def compression_note(asked: Compression, recipe: Recipe, outcome: Outcome) -> str:
    """What llm-compressor did."""
    scheme = recipe.linear
    assert scheme is not None
    done = f"llm-compressor {outcome.value} quantized the linears ({asked.method}, {scheme.bits} bit, groups of"
    return f"{done} {scheme.group_size}); the loss is against the model before that"


def allocation_notes(outcome: Outcome) -> list[str]:
    """On widths that were chosen for a size or a loss."""
    found: Allocated = outcome.value
    if found.loss is None:
        return ["--max-kld has no width to choose here: no matrix is plain, and what loses nothing stays as it is"]
    total = sum(found.weights.values())
    parts = ", ".join(f"{100 * count / total:.1f} % {name}" for name, count in found.weights.items())
    sizes = ", ".join(f"{name} {size} bytes" for name, size in found.sizes.items())
    asked = f"--{found.goal.kind.replace('_', '-')} {found.goal.most:g}"
    rest = f"; as the recipe has them: {_kinds(found.rest)}" if found.rest else ""
    lost = f"{found.loss:.3g} nats to be expected" if found.measured is None else f"{found.measured:.3g} nats measured"
    told = f"widths were chosen for {asked}: {parts} of {total} weights; {lost}; {sizes}"
    return [f"{told}{rest}"]


def rounding_notes(outcome: Outcome) -> list[str]:
    """On what linears and the head were rounded; the rest of what is quantized is counted, not named."""
    found: Rounded | None = outcome.value
    if found is None:
        return []
    rest = f"; each weight of others by itself: {_kinds(found.nearest)}" if found.nearest else ""
    return [f"{len(found.chosen)} matrices were rounded on what goes into them, {found.tokens} tokens{rest}"]


def lattice_notes(index: GridIndex, recipe: Recipe) -> list[str]:
    """Sentences about matrices off the lattice that others lie on: by an adapter, and by a fine-tune."""
    left = [record for record in index.tensors if record.left]
    tuned: list[GridRecord] = []
    if any(record.lossless and not record.native for record in index.tensors):
        tuned = [item for item in index.tensors if not (item.lossless or item.left) and is_linear(item.name)]
    notes = []
    if left:
        told, names = f"{len(left)} matrices that lay on one do no more", _kinds(item.name for item in left)
        notes.append(f"the merge left the lattice: {told}; {_becomes(left, recipe)}: {names}")
    if tuned:
        told = f"{len(tuned)} linears lie on no lattice where other matrices do, as fine-tuning leaves them"
        notes.append(f"{told}; {_becomes(tuned, recipe)}: {_kinds(item.name for item in tuned)}")
    return notes


def _becomes(records: list[GridRecord], recipe: Recipe) -> str:
    """What was done with matrices off their lattice."""
    plain = sum(record.bits is None for record in records)
    some = f"the recipe {recipe.name} quantized {'them' if not plain else len(records) - plain} anew"
    return some if not plain else f"{plain} of them stay plain" if plain == len(records) else f"{some}, {plain} stay"


def _kinds(names: Iterable[str]) -> str:
    """Names of tensors; layers are counted, not named."""
    kinds = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items())


def wording_notes(found: TokenizerReport | None, talked: ChatReport | None) -> tuple[str, ...]:
    """A sentence where a runtime errs with an artefact that is right."""
    result = [] if found is None else [*found.notes]
    if found is not None and found.runtime_only:
        shown = next(item for item in found.differences if item.runtime)
        result.append(
            f"{found.name} tokenizes {found.runtime_only} of {found.texts} texts differently from the checkpoint, with "
            f"tables that give the checkpoint's tokens: {shown.text!r} is {_some(shown.found)} instead of "
            f"{_some(shown.expected)}"
        )
    result += () if talked is None else talked.notes
    if talked is not None and talked.refusal is not None and talked.conversations:
        result.append(
            f"the chat template takes no plain text ({talked.refusal}): clients have to give contents in parts, "
            '[{"type": "text", "text": …}]'
        )
    if talked is not None and talked.runtime_only:
        which = ", ".join(item.conversation for item in talked.differences if item.runtime)
        result.append(f"{talked.engine} lays out conversations differently with the checkpoint's own template: {which}")
    return tuple(result)


def judging_notes(weights: WeightsReport) -> tuple[str, ...]:
    """Sentences where weights were held to no promise, in an artefact of which nobody says who made it."""
    said = []
    if weights.folded:
        does = "channel scales are folded into norms and linears, as AWQ does, which changes no output"
        said.append(f"{does}; these are compared with the checkpoint's under the same scales: {_kinds(weights.folded)}")
    unknown = sum(item.kept is None and item.blocks is not None for item in weights.tensors)
    if not unknown:
        return tuple(said)
    many = "1 matrix has codes that are" if unknown == 1 else f"{unknown} matrices have codes that are"
    rule = "their blocks are judged by the least error that such blocks can reach"
    again = "what a run rounds on inputs is not rounded again to be compared"
    said.append(f"{many} neither the checkpoint's nor what rounding to nearest gives: {rule}; {again}")
    return tuple(said)


def _some(ids: tuple[int, ...], limit: int = 8) -> str:
    return f"[{', '.join(map(str, ids[:limit]))}{', …' if len(ids) > limit else ''}]"
