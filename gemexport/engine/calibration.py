"""The node `calibrate`: ranges of activations, measured once for every variant that computes in integers.

They lie in the work folder and are used again for the same checkpoint, text and sizes of the graphs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.grids.recipe import Recipe
from gemexport.formats.grids.search import fingerprint
from gemexport.formats.storage.files import atomic
from gemexport.shared.place import RANGES, Place, opened

CALIBRATION_TOKENS = 65536  # of a text file: what follows is not read
OWN = frozenset({"calibration", "ranges"})  # options that say where ranges come from: then there is nothing to measure


def ranges_file(place: Place) -> Path:
    """Where the ranges lie: of the weights as they are, or with per-layer embeddings in a vector codec."""
    return place.work / RANGES / f"{'plain' if place.codec is None else place.codec.label}.json"


def calibrate(
    place: Place, recipe: Recipe, text: Path | None, sizes: Mapping[str, Any], progress: Callable[[int], None]
) -> int:
    """Leave the ranges of all activations in `ranges_file(place)`; progress in bytes of the source.

    `text` is a file to measure them on (the built-in calibration texts when None), `sizes` the `context` and `prefill`
    of the graphs that were asked for. Returns the number of tokens; raises InputError for a text that cannot be read.
    """
    from gemexport.exporters import onnx
    from gemexport.formats.activations.ranges import read_ranges

    checkpoint, _ = opened(place)
    sequences = samples(place, checkpoint, text)
    file = ranges_file(place)
    marker, mark = file.with_suffix(".mark"), _mark(place, checkpoint, recipe, sequences, sizes)
    if file.is_file() and marker.is_file() and marker.read_text("utf-8") == mark:
        progress(checkpoint.plain_nbytes())
        return read_ranges(file).tokens
    file.parent.mkdir(exist_ok=True)
    marker.unlink(missing_ok=True)
    found = onnx.ranges(checkpoint, file.with_suffix(""), sequences, progress=progress, **sizes)
    found.save(file)
    with atomic(marker) as partial:
        partial.write_text(mark, "utf-8")
    return found.tokens


def samples(place: Place, checkpoint: Checkpoint, text: Path | None) -> list[list[int]]:
    """The token sequences that activations are measured on: of a file all, else `place.tokens` of the built-in texts.

    Raises InputError for a text that cannot be read, or is empty.
    """
    from gemexport.shared.texts import tokens_of
    from gemexport.validators.checks import prompts

    ids, decoder = tokens_of(checkpoint, text), checkpoint.architecture
    if text is None:
        return prompts.sequences(spread(ids, place.tokens), decoder, place.tokens)
    return prompts.sequences(ids, decoder, min(sum(map(len, ids)), CALIBRATION_TOKENS) + 1)


def spread(sequences: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """So many of the sequences that they have about `tokens` tokens, from all over the text; one at least."""
    total = sum(map(len, sequences))
    count = max(1, min(len(sequences), len(sequences) * tokens // max(total, 1)))
    return [sequences[i * len(sequences) // count] for i in range(count)]


def _mark(
    place: Place, checkpoint: Checkpoint, recipe: Recipe, sequences: list[list[int]], sizes: Mapping[str, Any]
) -> str:
    """A digest of all that the ranges depend on."""
    facts = [fingerprint(checkpoint, recipe), str(place.codec), sequences, sorted(sizes.items())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
