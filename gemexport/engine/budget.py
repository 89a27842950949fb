"""The node `allocate`: widths of plain matrices for a size, a mean width or a loss, one choice for all artefacts.

What widths cost in nats was measured (engine/sensitivity.py); what they cost in bytes the exporters say, which lay an
artefact out to the byte before they write one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gemexport.engine.artefact import Artefact
from gemexport.engine.rounding import quantized
from gemexport.engine.sensitivity import Sensitivity, measure
from gemexport.engine.settling import rounded_loss, settled
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.grids.allocation import OPTIONS, PLAIN, Choice, Goal, Price, Unit, choose
from gemexport.formats.grids.expected import rounded
from gemexport.formats.grids.recipe import Recipe, Scheme
from gemexport.formats.grids.search import GridIndex, allocate, read_index
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import Tensor
from gemexport.shared.measured import Allocated, Swept
from gemexport.shared.place import Place, Progress

PLAIN_BITS = 16.0  # of a weight that stays as it is, where codes alone are counted
SWEPT = 12  # points of a curve
TRIES = 8  # of a size: what files take besides weights depends on the choice a little


def allocate_widths(
    place: Place, recipe: Recipe, goal: Goal, artefacts: Sequence[Artefact], text: Path | None, progress: Progress
) -> Allocated:
    """Choose the width of every plain matrix and leave the grids of `place`, which are others than those found.

    Progress in layers, each twice, and for a loss once more for each of settling's tries. Raises InputError for a size
    or a width that cannot be met, and for one that is asked of a model without plain matrices; a loss is that already.
    """
    found = replace(place, allocated=False)
    checkpoint, index = found.open(), read_index(found.grids)
    assert index is not None
    names = [record.name for record in quantized(index)]
    if not names:
        return Allocated(_nothing(place, found, checkpoint, index, goal), goal)
    plain = found.checkpoint()
    _check(plain, checkpoint, names, artefacts, goal)
    known = measure(found, recipe, text, progress)
    curve = Curve(plain, checkpoint, known.units, artefacts)

    def write(choice: Choice) -> GridIndex:
        schemes = choice.schemes(known.units)
        return allocate(plain, found.grids, place.grids, _mark(known, schemes), schemes)

    def measured(choice: Choice) -> float:
        write(choice)
        return rounded_loss(place, recipe, text)

    if goal.kind == "max_kld":
        layers = len(checkpoint.architecture.layers)
        choice, loss = settled(curve.within, measured, goal.most, lambda tries: progress(tries * layers))
    else:
        choice, loss = curve.choice(goal), None
    counted, sizes = _counted(known.units, choice), curve.sizes(choice)
    return Allocated(write(choice), goal, choice.loss, loss, counted, sizes, known.rest)


def sweep_widths(
    place: Place, recipe: Recipe, artefacts: Sequence[Artefact], text: Path | None, progress: Progress
) -> list[Swept]:
    """Points on the curve of each artefact by itself, from its narrowest codes to 8 bits, the smallest first.

    Progress in layers, each twice. Raises InputError for a model without plain matrices.
    """
    checkpoint, plain, index = place.open(), place.checkpoint(), read_index(place.grids)
    assert index is not None
    if not quantized(index):
        raise _unasked(checkpoint, "use export")
    known = measure(place, recipe, text, progress)
    return [
        point for artefact in artefacts for point in Curve(plain, checkpoint, known.units, [artefact]).points(SWEPT)
    ]


def _unasked(checkpoint: Checkpoint, remedy: str) -> InputError:
    problem = "has no matrix whose width is to choose: they lie on a lattice, have codes or stay as they are"
    return InputError(checkpoint.path, problem, remedy)


def _nothing(place: Place, found: Place, checkpoint: Checkpoint, index: GridIndex, goal: Goal) -> GridIndex:
    """The grids as they were found, for a model whose widths are not ours to choose."""
    if goal.kind != "max_kld":
        raise _unasked(checkpoint, f"leave out --{goal.kind}")
    return allocate(checkpoint, found.grids, place.grids, f"as found: {index.fingerprint}", {})


def held(artefacts: Sequence[Artefact]) -> tuple[int, ...]:
    """The bits of codes that all of the artefacts hold as narrow as they are."""
    return tuple(sorted(set.intersection(*(set(artefact.widths) for artefact in artefacts))))


def _check(
    plain: Checkpoint, gridded: Checkpoint, names: Sequence[str], artefacts: Sequence[Artefact], goal: Goal
) -> None:
    """InputError for a size or a width that nothing could meet, before anything is measured."""
    widths = held(artefacts)
    if goal.kind == "bits" and goal.most < widths[0]:
        problem = f"cannot be had: codes have {', '.join(map(str, widths))} bits in {_all(artefacts)}"
        raise InputError(f"--bits {goal.most:g}", problem, f"give {widths[0]} or more")
    if goal.kind == "size":
        narrowest = on_schemes(plain, gridded, dict.fromkeys(names, Scheme(bits=widths[0])))
        for artefact in artefacts:
            least = artefact.size(narrowest)
            if least > goal.most:
                problem = f"is too small: {artefact} takes {least} bytes in codes of {widths[0]} bits"
                raise InputError(f"--size {goal.most:.0f}", problem, "give more, or leave the format out")


def _all(artefacts: Sequence[Artefact]) -> str:
    return ", ".join(map(str, artefacts))


def on_schemes(plain: Checkpoint, gridded: Checkpoint, schemes: Mapping[str, Scheme | None]) -> Checkpoint:
    """`gridded` with some of its matrices in other schemes, with scales of 1, or as they are in `plain`."""
    tensors: dict[str, Tensor] = dict(gridded.tensors)
    for name, scheme in schemes.items():
        tensor = plain.tensors[name]
        tensors[name] = tensor if scheme is None else rounded(tensor, scheme) or tensor
    return replace(gridded, tensors=tensors)


def _mark(known: Sensitivity, schemes: Mapping[str, Scheme | None]) -> str:
    said = {name: None if scheme is None else scheme.model_dump() for name, scheme in schemes.items()}
    return hashlib.sha256(json.dumps([known.mark, said], sort_keys=True).encode()).hexdigest()


def _counted(units: Sequence[Unit], choice: Choice) -> dict[str, int]:
    found: Counter[str] = Counter()
    for unit, option in zip(units, choice.options, strict=True):
        found["as it is" if option == PLAIN else f"{OPTIONS[option].bits} bit"] += unit.weights
    return dict(sorted(found.items()))


class Curve:
    """Sizes and losses of all choices for some artefacts together."""

    def __init__(
        self, plain: Checkpoint, gridded: Checkpoint, units: Sequence[Unit], artefacts: Sequence[Artefact]
    ) -> None:
        """`gridded` is `plain` with the grids that were found in it."""
        self._plain, self._gridded, self._units, self._artefacts = plain, gridded, units, artefacts
        self.widths = held(artefacts)
        self._prices = [self._price(artefact) for artefact in artefacts]
        self._known: dict[Choice, dict[str, int]] = {}

    def _price(self, artefact: Artefact) -> Price:
        """What each width takes: one class of units after the other in it, the others as they are."""
        fixed = artefact.size(self._with({}))
        groups: dict[str, list[Unit]] = {}
        for unit in self._units:
            groups.setdefault(unit.group, []).append(unit)
        taken = {}
        for name, units in groups.items():
            weights, bare = sum(unit.weights for unit in units), self._bare(units)
            sizes = [self._sized(artefact, units, scheme) - fixed + bare for scheme in OPTIONS]
            taken[name] = tuple(size / weights for size in (*sizes, bare))
        return Price(fixed - sum(self._bare(units) for units in groups.values()), taken)

    def _bare(self, units: Sequence[Unit]) -> float:
        """Bytes of units as they are, as bf16; what an artefact takes beyond is fixed."""
        return sum(unit.weights for unit in units) * PLAIN_BITS / 8

    def _sized(self, artefact: Artefact, units: Sequence[Unit], scheme: Scheme) -> int:
        return artefact.size(self._with({name: scheme for unit in units for name in unit.names}))

    def _with(self, schemes: Mapping[str, Scheme | None]) -> Checkpoint:
        """The checkpoint with its units in these schemes, those that are not named as they are."""
        every = {name: schemes.get(name) for unit in self._units for name in unit.names}
        return on_schemes(self._plain, self._gridded, every)

    def sizes(self, choice: Choice) -> dict[str, int]:
        """Bytes of every artefact."""
        if choice not in self._known:
            checkpoint = self._with(choice.schemes(self._units))
            self._known[choice] = {str(artefact): artefact.size(checkpoint) for artefact in self._artefacts}
        return self._known[choice]

    def choice(self, goal: Goal) -> Choice:
        """The best choice; InputError where there is none."""
        return {"size": self._of_size, "bits": self._of_bits, "max_kld": self.within}[goal.kind](goal.most)

    def within(self, nats: float) -> Choice:
        """The smallest choice whose loss is to be expected within so many nats a position."""
        found = choose(self._units, self.widths, self._prices, loss=nats)
        assert found is not None  # what stays as it is loses nothing
        return found

    def points(self, count: int) -> list[Swept]:
        """Choices of the first artefact, from the narrowest codes there are to the widest, by so many equal steps.

        Where a step is too small for any matrix, one point stands for two.
        """
        artefact = self._artefacts[0]
        found: list[Swept] = []
        ends = [self._of_bits(self.widths[0]), self._of_bits(self.widths[-1])]
        low, high = (self.sizes(choice)[str(artefact)] for choice in ends)
        between = [self._of_size(low + (high - low) * number / (count - 1)) for number in range(1, count - 1)]
        for choice in (ends[0], *between, ends[1]):
            if found and choice.loss >= found[-1].loss:
                continue
            weights = _counted(self._units, choice)
            codes = [PLAIN_BITS if option == PLAIN else OPTIONS[option].bits for option in choice.options]
            bits = sum(unit.weights * width for unit, width in zip(self._units, codes, strict=True))
            mean = bits / sum(weights.values())
            found.append(Swept(str(artefact), self.sizes(choice)[str(artefact)], mean, choice.loss, weights))
        return found

    def _of_size(self, most: float) -> Choice:
        limits = [most] * len(self._prices)
        for _ in range(TRIES):
            found = choose(self._units, self.widths, self._prices, limits)
            if found is None:
                break
            over = [max(0.0, size - most) for size in self.sizes(found).values()]
            if not any(over):
                return found
            limits = [limit - much for limit, much in zip(limits, over, strict=True)]
        # Even what config.json says of the modules that differ may be too much: those of one width it need not name.
        found = self._of_bits(self.widths[0])
        if max(self.sizes(found).values()) > most:
            raise InputError(f"--size {most:.0f}", f"is a little too small for {_all(self._artefacts)}", "give more")
        return found

    def _of_bits(self, most: float) -> Choice:
        """Codes alone count, so that a mean of 4 bits is what a recipe of 4 bits has."""
        bits = tuple(float(scheme.bits) for scheme in OPTIONS)
        price = Price(0.0, {unit.group: (*bits, PLAIN_BITS) for unit in self._units})
        total = sum(unit.weights for unit in self._units)
        found = choose(self._units, self.widths, [price], [most * total])
        assert found is not None  # the narrowest width was looked at before
        return found
