"""What each width of each matrix costs in nats, measured once a checkpoint, a layer at a time.

On the way forward the inputs of each linear are added up, and some of its rows rounded on them in every width, as the
node `round` will; on the way back (validators/reference/gradients.py) the gradients of other texts say what of that the
logits mind. Tables are rounded whole, to nearest, and looked up again; some rows of the head say how much less it loses
that is rounded on its inputs. None of it is measured on texts that losses are judged on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from gemexport.engine.calibration import spread
from gemexport.engine.rounding import ENOUGH, candidates, head, head_inputs, outer_products, quantized
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.names import EMBEDDING, HEAD, PER_LAYER_EMBEDDING
from gemexport.formats.grids.allocation import OPTIONS, Unit
from gemexport.formats.grids.recipe import Recipe, Scheme
from gemexport.formats.grids.search import GridIndex, fingerprint, read_index
from gemexport.formats.storage.files import atomic
from gemexport.formats.tensor import DType, Floats, Grid, Rows, Tensor, TensorBase, expand
from gemexport.shared.place import Place, Progress, threads

if TYPE_CHECKING:
    import torch

    from gemexport.formats.grids.feedback import Inputs
    from gemexport.validators.reference import Reference
    from gemexport.validators.reference.gradients import Backwards
    from gemexport.validators.reference.walk import Visit, Walk

VERSION = 2
FILE = "sensitivity.json"
LENGTH = 256  # tokens of a sequence
FITTED_TOKENS = 4096  # that rows are rounded on
GRADIENT_TOKENS = 2048  # of sequences that gradients are of, and nothing is rounded on; a third of the text at most
POSITIONS = 4  # of so many tokens of these one's logits count
ROWS = 64  # of a linear that are rounded in every width, from all over it
HEAD_ROWS = 256  # of a head
TABLES = (EMBEDDING, HEAD, PER_LAYER_EMBEDDING)


class Sensitivity(BaseModel):
    """The units of a checkpoint, what of its plain matrices is none, and what it was measured by."""

    model_config = ConfigDict(frozen=True)

    mark: str
    units: tuple[Unit, ...]
    rest: tuple[str, ...]  # matrices that keep the recipe's width: experts, and what no text reaches


def scratch_bytes(checkpoint: Checkpoint) -> int:
    """What waits on the disk meanwhile: rows of every linear that are off, and states of the texts for the way back."""
    linears = [spec for spec in checkpoint.model.specs.values() if spec.role.in_layer and len(spec.shape) > 1]
    off = 4 * len(OPTIONS) * sum(min(ROWS, spec.shape[0]) * spec.shape[-1] for spec in linears)
    decoder = checkpoint.architecture
    per_layer = 0 if decoder.per_layer is None else decoder.per_layer.dim
    streams = 1 if decoder.streams is None else decoder.streams.count
    states = 4 * len(decoder.layers) * (decoder.hidden_size * streams + 2 * per_layer)
    return off + (GRADIENT_TOKENS + FITTED_TOKENS) * states


def measure(place: Place, recipe: Recipe, text: Path | None, progress: Progress) -> Sensitivity:
    """The units of the plain matrices in the grids of `place`; progress in layers, each twice.

    What an earlier run measured for the same checkpoint, recipe and text is used as it is. Raises InputError for a text
    that cannot be read.
    """
    checkpoint, index = place.open(), read_index(place.grids)
    assert index is not None
    sequences = _sequences(checkpoint, text)
    facts = [VERSION, fingerprint(checkpoint, recipe), sequences]
    mark = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    file = place.work / FILE
    if file.is_file():
        found = Sensitivity.model_validate_json(file.read_bytes())
        if found.mark == mark:
            progress(2 * len(checkpoint.architecture.layers))
            return found
    units = _Measuring(place, checkpoint, index, recipe, sequences, progress).units()
    named = {name for unit in units for name in unit.names}
    rest = tuple(record.name for record in quantized(index) if record.name not in named)
    found = Sensitivity(mark=mark, units=tuple(units), rest=rest)
    with atomic(file) as partial:
        partial.write_text(found.model_dump_json(indent=1), "utf-8")
    return found


def _sequences(checkpoint: Checkpoint, text: Path | None) -> list[list[int]]:
    """Short sequences from all over the text: the more of them, the more gradients there are."""
    from gemexport.shared.texts import tokens_of
    from gemexport.validators.checks import prompts

    ids, decoder = tokens_of(checkpoint, text), checkpoint.architecture
    everything = prompts.sequences(ids, decoder, sum(map(len, ids)) + 1, LENGTH)
    return spread(everything, GRADIENT_TOKENS + FITTED_TOKENS)


@dataclass
class _Measuring:
    """One measurement on its way."""

    place: Place
    checkpoint: Checkpoint
    index: GridIndex
    recipe: Recipe
    sequences: Sequence[list[int]]
    progress: Progress
    lost: dict[str, np.ndarray] = field(default_factory=dict)  # by matrix, nats a position of each of OPTIONS
    together: list[tuple[str, ...]] = field(default_factory=list)

    def units(self) -> list[Unit]:
        """Every unit with its losses, tables last."""
        tables = [record.name for record in quantized(self.index) if record.name in TABLES]
        reference = self._reference()
        held_out = spread(self.sequences, min(GRADIENT_TOKENS, sum(map(len, self.sequences)) // 3))
        others = [sequence for sequence in self.sequences if sequence not in held_out] or self.sequences
        with (
            TemporaryDirectory(prefix="off-") as folder,
            reference.walk(others) as forwards,
            reference.walk(held_out, keeps=True) as kept,
        ):
            self._forwards(reference, forwards, kept, Path(folder))
            self._backwards(kept, Path(folder), tables, self._won(forwards, kept, tables))
        groups = [(group, False) for group in self.together] + [((name,), True) for name in tables]
        return [self._unit(names, table) for names, table in groups]

    def _unit(self, names: tuple[str, ...], table: bool) -> Unit:
        weights = sum(int(np.prod(self.checkpoint.tensors[name].shape)) for name in names)
        lost = np.sum([self.lost[name] for name in names], axis=0).tolist()
        width = self.checkpoint.tensors[names[0]].shape[-1]
        held = (nats if width % scheme.group_size == 0 else None for scheme, nats in zip(OPTIONS, lost, strict=True))
        return Unit(names=names, weights=weights, table=table, lost=tuple(held))

    def _reference(self, others: Mapping[str, Tensor] | None = None) -> Reference:
        """The checkpoint's, but for some tensors."""
        from gemexport.validators.reference import reference

        return reference(self.checkpoint.text_config, {**self.checkpoint.tensors, **(others or {})}, threads())

    def _forwards(self, reference: Reference, forwards: Walk, kept: Walk, folder: Path) -> None:
        """Round rows of every linear in every width, and leave in `folder` what that is off by."""
        wanted = candidates(self.index, self.checkpoint.model)
        for index, module in enumerate(reference.decoder.text.layers):
            weights = reference.decoder.weights(module)
            with forwards.layer(index, weights) as visit:
                groups = [tuple(name for name in group if name in wanted) for group in visit.together()]
                groups = [names for names in groups if names]
                self.together += groups
                for names, gram in zip(groups, _grams(visit, [names[0] for names in groups]), strict=True):
                    for name, off in self._off(names, gram):
                        np.save(folder / name, off)
            with kept.layer(index, weights):
                pass
            self.progress(1)

    def _off(self, names: Sequence[str], gram: Floats) -> Iterator[tuple[str, Floats]]:
        """What some rows of matrices of one input are off by, `[options, rows, in]`."""
        from gemexport.formats.grids.feedback import Inputs

        fit = _nearest if self.recipe.rounding == "nearest" else _on(Inputs.of(gram))
        for name in names:
            tensor = self.checkpoint.tensors[name]
            rows = _rows(tensor.shape[0])
            values = np.concatenate([tensor.rows(row, row + 1).values for row in rows])
            yield name, np.stack([values - fit(values, scheme) for scheme in OPTIONS])

    def _won(self, forwards: Walk, kept: Walk, tables: Sequence[str]) -> Won:
        """What rounding a head on its inputs changes."""
        name = head(self.checkpoint.model)
        if self.recipe.rounding == "nearest" or name not in tables:
            return Won(np.ones(len(OPTIONS)), np.ones(len(OPTIONS)))
        tensor = self.checkpoint.tensors[name]
        rows = _rows(tensor.shape[0], HEAD_ROWS)
        values = np.concatenate([tensor.rows(row, row + 1).values for row in rows])
        seen = outer_products(kept.last(), tensor.shape[1])
        return Won.of(values, _on(head_inputs(forwards, self.checkpoint)), seen)

    def _backwards(self, kept: Walk, folder: Path, tables: Sequence[str], won: Won) -> None:
        """What the logits mind of it all."""
        from gemexport.validators.reference.gradients import Backwards

        positions = [range(0, len(sequence), POSITIONS) for sequence in kept.sequences]
        count, back = sum(map(len, positions)), Backwards(kept, positions)
        output = head(self.checkpoint.model)
        roundings = {str(n): _whole(scheme) for n, scheme in enumerate(OPTIONS)} if output in tables else {}
        minded = back.head(roundings)
        if roundings:
            self.lost[output] = won.multiplied * [minded[name] for name in roundings]

        def watch(name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
            file = folder / f"{name}.npy"
            if file.is_file():
                self._add(name, (gradient[:, _rows(gradient.shape[1])].T @ x).numpy(), np.load(file), count)

        back.layers(watch, lambda: self.progress(1))
        for name in tables:
            if name != HEAD:
                entered = self._entered(back, kept, name) * (won.looked_up if name == output else 1.0)
                self.lost[name] = self.lost.get(name, 0.0) + entered

    def _add(self, name: str, gradients: Floats, off: Floats, count: int) -> None:
        """Add what one sequence minds of rows that are off, `[options, rows, in]`, its gradients being `[rows, in]`."""
        noticed = np.einsum("ri,ori->or", gradients, off, dtype=np.float64)
        share = self.checkpoint.tensors[name].shape[0] / len(gradients)
        self.lost[name] = self.lost.get(name, 0.0) + np.square(noticed).sum(1) * (share / (2 * count))

    def _entered(self, back: Backwards, kept: Walk, name: str) -> np.ndarray:
        """What it costs that a table is looked up in each of OPTIONS."""
        found = []
        for scheme in OPTIONS:
            table = _Rounded(self.checkpoint.tensors[name], scheme)
            with self._reference({name: table}).walk(kept.sequences) as other:
                found.append(back.entered(other))
        return np.array(found)


@dataclass(frozen=True)
class Won:
    """What a head that is rounded on its inputs loses in each of OPTIONS, as a share of what one to nearest does."""

    multiplied: np.ndarray  # in its logits
    looked_up: np.ndarray  # as a table, where it is the embedding too: there each direction counts alike

    @classmethod
    def of(cls, values: Floats, fit: Callable[[Floats, Scheme], Floats], seen: Floats) -> Won:
        """By some rows, `[rows, in]`, and the outer products `[in, in]` of inputs that `fit` was not made of."""
        multiplied, looked_up = np.ones(len(OPTIONS)), np.ones(len(OPTIONS))
        for number, scheme in enumerate(OPTIONS):
            if scheme.bits < ENOUGH and values.shape[1] % scheme.group_size == 0:
                on, nearest = values - fit(values, scheme), values - _nearest(values, scheme)
                # Rows that are codes already are off by nothing, either way.
                multiplied[number] = _ratio(((on @ seen) * on).sum(), ((nearest @ seen) * nearest).sum())
                looked_up[number] = _ratio(np.square(on).sum(), np.square(nearest).sum())
        return cls(multiplied, looked_up)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 1.0


def _rows(count: int, most: int = ROWS) -> list[int]:
    """Rows from all over a matrix."""
    return sorted({int(row) for row in np.linspace(0, count - 1, min(count, most))})


def _grams(visit: Visit, names: Sequence[str]) -> list[Floats]:
    """Of each of these matrices the sum of the outer products of its inputs, `[in, in]`, over all sequences."""
    found = {name: np.zeros((visit.matrices[name].in_features,) * 2, np.float32) for name in names}

    def add(name: str, x: torch.Tensor) -> None:
        if name in found:
            rows = x.flatten(0, -2).numpy()
            found[name] += rows.T @ rows

    with visit.watch(add):
        for _ in visit.outputs():
            pass
    return list(found.values())


def _on(inputs: Inputs) -> Callable[[Floats, Scheme], Floats]:
    """What rows stand for once they are rounded on these inputs."""
    from gemexport.formats.grids.feedback import fit

    def rounded(values: Floats, scheme: Scheme) -> Floats:
        if values.shape[1] % scheme.group_size:
            return values
        codes, scales = fit(values, inputs, scheme.group_size, scheme.bits)
        return codes * expand(scales, scheme.group_size)

    return rounded


def _nearest(values: Floats, scheme: Scheme) -> Floats:
    """What rows stand for once each weight is rounded by itself."""
    from gemexport.formats.grids.lattice import encode
    from gemexport.formats.grids.rounding import fit

    if values.shape[1] % scheme.group_size:
        return values
    scales = fit(values, scheme.group_size, scheme.bits)
    return encode(values, scales, scheme.bits) * expand(scales, scheme.group_size)


def _whole(scheme: Scheme) -> Callable[[Floats], Floats]:
    return lambda values: _nearest(values, scheme)


class _Rounded(TensorBase):
    """A tensor with each weight rounded by itself."""

    grid: Grid | None = None

    def __init__(self, base: Tensor, scheme: Scheme) -> None:
        self.name, self.shape, self._base, self._scheme = base.name, base.shape, base, scheme
        self.dtype: DType = "f32"

    def rows(self, start: int, stop: int) -> Rows:
        return Rows(_nearest(self._base.rows(start, stop).values, self._scheme))
