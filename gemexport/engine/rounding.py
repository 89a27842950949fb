"""The node `round`: codes of plain linears that are chosen on what goes into them, layer by layer, the head last.

The model's own layers compute what calibration texts make of each matrix' inputs, with the layers before it rounded
already; on these the matrix is rounded (formats/grids/feedback.py), and what comes out of the rounded layer goes into
the next. Codes and scales take the place of the nearest ones in the grids that every format is made of.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemexport.engine.calibration import CALIBRATION_TOKENS, spread
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.model import LOGITS, Model
from gemexport.formats.gemma.names import EMBEDDING, HEAD
from gemexport.formats.gemma.roles import Kind
from gemexport.formats.grids.recipe import Recipe
from gemexport.formats.grids.search import Chosen, GridIndex, GridRecord, choose, fingerprint, read_index
from gemexport.formats.storage.parallel import by_rows
from gemexport.formats.tensor import Codes, Floats, Tensor, expand
from gemexport.shared.measured import Rounded
from gemexport.shared.place import Place, Progress, threads

if TYPE_CHECKING:
    import torch

    from gemexport.formats.grids.feedback import Inputs
    from gemexport.validators.reference.walk import Walk

VERSION = 3  # of how codes are chosen: what an earlier one chose is chosen again
ENOUGH = 8  # bits of a head that lose so little that choosing them is not worth the time: it has the most weights


def rounds(recipe: Recipe, compressed: bool = False) -> bool:
    """Whether plain linears and the head are rounded on what goes into them; of what was compressed, the head alone."""
    few = recipe.embedding is not None and recipe.embedding.bits < ENOUGH
    return recipe.rounding == "data" and (few or (not compressed and recipe.linear is not None))


def quantized(index: GridIndex) -> list[GridRecord]:
    """The tensors that lie on no lattice and that the recipe has quantized."""
    return [record for record in index.tensors if record.bits is not None and not record.lossless]


def candidates(index: GridIndex, model: Model) -> dict[str, GridRecord]:
    """Those of them that are linears of a layer, or a head of few bits, by name."""
    linears = {*rounded(model)}
    found = {record.name: record for record in quantized(index) if record.name in linears}
    output = found.get(head(model))
    if output is not None and output.bits is not None and output.bits >= ENOUGH:
        del found[output.name]
    return found


def rounded(model: Model) -> Iterator[str]:
    """The matrices that a walk through the layers meets the inputs of: linears of a layer, and the head."""
    for name, spec in model.specs.items():
        gives = name == head(model) and model.gives == LOGITS  # else it is a table alone
        if (spec.role.kind is Kind.LINEAR and spec.role.in_layer) or gives:
            yield name


def head(model: Model) -> str:
    """The matrix that gives the logits."""
    return EMBEDDING if model.decoder.tied else HEAD


def round_linears(place: Place, recipe: Recipe, text: Path | None, progress: Progress) -> Rounded:
    """Choose the codes of every plain linear of a layer and of the head, in the grids of `place`; progress in weights.

    `text` is a file to take the inputs from (the built-in calibration texts when None). What an earlier run chose for
    the same checkpoint, recipe and text is used as it is. Raises InputError for a text that cannot be read.
    """
    checkpoint, index = place.open(), read_index(place.grids)
    assert index is not None
    wanted, model = candidates(index, checkpoint.model), checkpoint.model
    sequences = _sequences(checkpoint, text)
    mark = _mark(checkpoint, recipe, sequences)
    if index.chosen == mark:
        progress(sum(math.prod(model.specs[name].shape) for name in rounded(model)))
    else:
        index = choose(place.grids, mark, _chosen(place, checkpoint, wanted, sequences, progress))
    chosen = tuple(record.name for record in index.tensors if record.codes is not None)
    rest = tuple(record.name for record in quantized(index) if record.codes is None)
    return Rounded(sum(map(len, sequences)), chosen, rest)


def _sequences(checkpoint: Checkpoint, text: Path | None) -> list[list[int]]:
    """Token sequences: more tokens than the widest row has weights, if the text has as many."""
    from gemexport.shared.texts import tokens_of
    from gemexport.validators.checks import prompts

    ids, decoder = tokens_of(checkpoint, text), checkpoint.architecture
    everything = prompts.sequences(ids, decoder, sum(map(len, ids)) + 1)
    widest = max(layer.intermediate_size for layer in decoder.layers)
    return spread(everything, min(CALIBRATION_TOKENS, max(2048, 8 * widest)))


def _mark(checkpoint: Checkpoint, recipe: Recipe, sequences: list[list[int]]) -> str:
    """A digest of all that the codes depend on."""
    facts = [VERSION, fingerprint(checkpoint, recipe), sequences]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _chosen(
    place: Place,
    checkpoint: Checkpoint,
    wanted: Mapping[str, GridRecord],
    sequences: Sequence[Sequence[int]],
    progress: Progress,
) -> Iterator[Chosen]:
    """The linears of one layer after the other and the head, each with its codes and scales."""
    from gemexport.formats.grids.feedback import DAMPING
    from gemexport.shared.place import model_activations
    from gemexport.validators.reference import reference

    computed = reference(
        checkpoint.text_config, checkpoint.tensors, threads(), activations=model_activations(checkpoint),
        embedder=checkpoint.model.embedder,
    )  # fmt: skip
    tensors, output = checkpoint.tensors, head(checkpoint.model)
    with computed.walk(sequences) as walk:
        for visit in walk.layers():
            for group in visit.together():
                names = [name for name in group if name in wanted]
                if names:
                    inputs = _inputs(visit.inputs(names[0]), visit.matrices[names[0]].in_features, DAMPING)
                for name in names:
                    yield name, _slices(tensors[name], wanted[name], inputs, visit.matrices[name].weight)
                progress(sum(math.prod(tensors[name].shape) for name in group))
        if output in wanted:
            yield output, _slices(tensors[output], wanted[output], head_inputs(walk, checkpoint))
        progress(math.prod(tensors[output].shape) if checkpoint.model.gives == LOGITS else 0)


def head_inputs(walk: Walk, checkpoint: Checkpoint) -> Inputs:
    """What the head is multiplied with at the end of a walk, as rounding asks for it."""
    from gemexport.formats.grids.feedback import DAMPING, TIED_DAMPING

    damping = TIED_DAMPING if checkpoint.architecture.tied else DAMPING
    return _inputs(walk.last(), checkpoint.architecture.hidden_size, damping)


def _inputs(found: Iterator[torch.Tensor], width: int, damping: float) -> Inputs:
    """What a matrix is multiplied with, `[n, in]` of each sequence in turn, as rounding asks for it."""
    from gemexport.formats.grids.feedback import Inputs

    return Inputs.of(outer_products(found, width), damping)


def outer_products(found: Iterator[torch.Tensor], width: int) -> Floats:
    """The sum of the outer products of all rows `[n, width]` of what comes, `[width, width]`."""
    import torch

    gram = torch.zeros((width, width))
    for x in found:
        gram.addmm_(x.float().T, x.float())
    return gram.numpy()


def _slices(
    tensor: Tensor, record: GridRecord, inputs: Inputs, weight: torch.Tensor | None = None
) -> Iterator[tuple[Codes, Floats]]:
    """Codes and scales of a tensor's rows, slice by slice; `weight` becomes what they stand for."""
    import torch

    from gemexport.formats.grids.feedback import fit

    assert record.bits is not None
    assert record.block is not None
    bits, block = record.bits, record.block
    start = 0
    for codes, scales in by_rows(lambda bounds: fit(tensor.rows(*bounds).values, inputs, block, bits), tensor):
        if weight is not None:
            with torch.no_grad():
                weight[start : start + len(codes)].copy_(torch.from_numpy(codes * expand(scales, block)))
        start += len(codes)
        yield codes, scales
