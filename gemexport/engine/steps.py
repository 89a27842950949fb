"""The steps of a run up to its validators, each a function that a process of its own calls with plain values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemexport.exporters.result import Export
from gemexport.formats.grids.recipe import Recipe
from gemexport.formats.grids.search import GridIndex, find_grids
from gemexport.formats.storage.files import atomic, remove
from gemexport.registry import TARGETS
from gemexport.shared.measured import Divergence
from gemexport.shared.place import (
    FLOORS,
    PLAYED_TOKENS,
    PRECISE,
    UNROUNDED,
    Place,
    Progress,
    model_activations,
    opened,
    played_of,
)
from gemexport.shared.probes import probe_of
from gemexport.shared.vectors import VectorDistance
from gemexport.shared.widths import widths

if TYPE_CHECKING:
    from gemexport.formats.grids.additive_fit import Record


def prepare() -> None:
    """Load what finding grids and exporting take, before there is a model: mostly the compiled loops."""
    from gemexport.formats.grids import lattice

    lattice.load()


def grids(place: Place, recipe: Recipe, progress: Progress) -> GridIndex:
    """Find the grid of every tensor; progress in weights."""
    return find_grids(place.checkpoint(), place.grids, recipe, progress)


def fit_codec(place: Place, progress: Progress) -> Record:
    """Fit the vector codec to the per-layer embeddings; progress in weights."""
    from gemexport.formats.grids.additive_fit import find_codec

    assert place.codec is not None
    return find_codec(place.checkpoint(), place.vectors, place.codec, progress)


def export(place: Place, target: str, variant: str, path: Path, options: dict[str, Any], progress: Progress) -> Export:
    """Write one artefact; progress in bytes of the source."""
    exporter, (checkpoint, notes) = TARGETS[target].exporter(), opened(place)
    result: Export = exporter.export(checkpoint, path, variant=variant, progress=progress, **options)
    written = widths(TARGETS[target].reader().tensors(path).values())
    return replace(result, notes=[*notes, *checkpoint.unpack().notes, *result.notes], widths=written)


def reference(place: Place, noises: tuple[str, ...], progress: Progress) -> dict[str, Divergence | VectorDistance]:
    """What the source's weights give in f32, and how far the same weights are from that in other arithmetics.

    Progress in positions, for f32 and each of `played_of(noises)` once a layer and once for the head.
    """
    from gemexport.validators.reference.store import compute_together

    checkpoint = place.plain()
    tensors, probe = dict(checkpoint.tensors), probe_of(checkpoint.model)
    passages = place.passages(checkpoint)
    sequences = [passage.tokens for passage in passages]
    wanted, played = [(place.source(), sequences)], {}
    for name in played_of(noises, checkpoint):
        arithmetic = name.removesuffix(UNROUNDED)
        # Rounding to integers makes two right programs differ, that of caches too, which transformers leaves out.
        own = arithmetic in ("f32-reordered", PRECISE)
        rounded = checkpoint.activations if own else model_activations(checkpoint)
        rounded = None if name.endswith(UNROUNDED) else rounded
        exact = place.store("source", checkpoint, tensors, rounded)
        noisy = place.store("source", checkpoint, tensors, rounded, arithmetic)
        # What is left of f32 differs little from token to token, but where integers are made of it.
        few = probe.prefixes and arithmetic.startswith("f32") and not rounded
        judged = [sequences[0][:PLAYED_TOKENS]] if few else sequences
        wanted += [(exact, sequences), (noisy, judged)]
        played[name] = exact, noisy, judged
    compute_together(wanted, progress)
    floors = {}
    for name, (exact, noisy, judged) in played.items():
        total = probe.sums()
        for whole, sequence in zip(sequences, judged, strict=False):
            given = exact.logits(whole)[: len(sequence)] if probe.prefixes else exact.logits(whole)
            total.add(given, noisy.logits(sequence), sequence)
        remove(noisy.folder)
        kinds = [(passage.kind, len(tokens)) for passage, tokens in zip(passages, judged, strict=False)]
        floors[name] = probe.figures(total, kinds)
    with atomic(place.work / FLOORS) as partial:
        partial.write_text(json.dumps({name: found.model_dump() for name, found in floors.items()}), "utf-8")
    return floors
