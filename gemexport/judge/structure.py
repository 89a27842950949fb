"""What graphs compute beside their weights against what the checkpoint's decoder computes, exactly, layer by layer.

Logits do not show it where a program rounds activations to integers: erf for tanh in one GELU moves them less.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gemexport.formats.gemma.architecture import Architecture, Layer
from gemexport.formats.gemma.names import CANONICAL
from gemexport.formats.gemma.roles import Role
from gemexport.shared.measured import FactReport
from gemexport.validators.structure import functions
from gemexport.validators.structure.functions import Scores
from gemexport.validators.structure.program import Number, Program

GELUS = {
    "tanh": "GELU in its tanh form",
    "erf": "GELU by erf",
    "sigmoid": "GELU by a sigmoid",
    "silu": "SiLU",
}
# Of what, in which layer, what it is (None: not known), and what it should be.
Said = tuple[str, int | None, str | None, str]


class Structure(NamedTuple):
    """What of a graph's structure is not the decoder's, and a sentence on what of it was not judged."""

    differences: tuple[FactReport, ...] = ()
    notes: tuple[str, ...] = ()


def judged_structure(target: str, path: Path, decoder: Architecture) -> Structure:
    """Every function, factor and cap of a graph that is not the decoder's, by what it belongs to; others have none.

    What is made in a way that is not known here is not judged. Raises InputError for graphs that are not whole.
    """
    layers: dict[tuple[str, str, str], set[int]] = {}
    unknown: set[str] = set()
    for file, program in _programs(target, path).items():
        for name, layer, found, expected in _judged(program, decoder):
            label = f"{file}: {name}" if file else name
            if found is None:
                unknown.add(label)
            else:
                layers.setdefault((label, found, expected), set()).update(() if layer is None else (layer,))
    differences = tuple(
        FactReport(name=name, found=found, expected=expected, layers=tuple(sorted(where)))
        for (name, found, expected), where in layers.items()
    )
    said = f"not judged, since the graph makes it in a way that is not known: {', '.join(sorted(unknown))}"
    return Structure(differences, (said,) if unknown else ())


def _programs(target: str, path: Path) -> dict[str, Program]:
    if target == "onnx":
        from gemexport.validators.structure import onnx

        return onnx.programs(path)
    if target == "coreml":
        from gemexport.validators.structure import mil

        return mil.programs(path)
    return {}


def _judged(program: Program, decoder: Architecture) -> Iterator[Said]:
    linears = {item.weight for item in program.of_kind("linear")} - {None}
    if linears:  # a graph that only looks tokens up has none
        yield from _functions(program, decoder)
        yield from _attentions(program, decoder)
        yield from _logits(program, decoder)
        yield from _norms(program, decoder)


def _norms(program: Program, decoder: Architecture) -> Iterator[Said]:
    for operator, weight, epsilon in functions.norms(program):
        place = None if weight is None else CANONICAL.find(weight)
        name, layer = (operator, None) if place is None else (CANONICAL.stem(place[0]), place[1])
        yield from _factor(f"the epsilon of {name}", layer, epsilon, decoder.rms_norm_eps)


def _functions(program: Program, decoder: Architecture) -> Iterator[Said]:
    found = dict(functions.gelus(program))
    for spec in decoder.specs():
        mode = found.get(spec.name)
        if spec.role in functions.GATES and mode != "tanh":
            name = f"what follows {CANONICAL.stem(spec.role).rpartition('.')[2]}"
            yield name, spec.layer, None if mode is None else GELUS[mode], GELUS["tanh"]


def _attentions(program: Program, decoder: Architecture) -> Iterator[Said]:
    found = dict(functions.attentions(program))
    for layer in decoder.layers:
        yield from _attention(layer, found.get(CANONICAL.name(Role.Q, layer.index)), decoder)


def _logits(program: Program, decoder: Architecture) -> Iterator[Said]:
    found = list(functions.logits(program))
    heads = {CANONICAL.name(role) for role in functions.HEADS}
    if not found and any(item.weight in heads for item in program.of_kind("linear")):
        found = [None]
    for scores in found:
        if scores is None:
            yield "the soft cap of logits", None, None, ""
        else:
            yield from _capped("the soft cap of logits", None, scores.cap, decoder.final_softcap)
            yield from _factor("the factor of logits", None, scores.whole, 1.0)


def _attention(layer: Layer, scores: Scores | None, decoder: Architecture) -> Iterator[Said]:
    if scores is None:
        yield "the attention scale", layer.index, None, ""
        return
    whole = scores.whole
    if scores.product.factor is None:
        whole = whole * Number(layer.head_dim**-0.5)
    yield from _factor("the attention scale", layer.index, whole, decoder.attention_scale)
    yield from _capped("the attention softcap", layer.index, scores.cap, decoder.attention_softcap)


def _capped(name: str, layer: int | None, found: Number | None, expected: float | None) -> Iterator[Said]:
    if found is None or expected is None:
        if found is not None or expected is not None:
            yield name, layer, "none" if found is None else _text(found.value), _text(expected)
    else:
        yield from _factor(name, layer, found, expected)


def _factor(name: str, layer: int | None, found: Number, expected: float) -> Iterator[Said]:
    if not found.is_near(expected):
        yield name, layer, _text(found.value), _text(expected)


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.7g}"
