"""What an artefact's own metadata say of the decoder against what the checkpoint says: a wrong number has a name here.

A GGUF file and folders with a config.json describe the whole decoder, a Core ML package its sliding window, ONNX
Runtime GenAI's configuration some sizes. Special tokens and templates are the tokenizer's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gemexport.formats.activations import Activations, CacheActivations, Quantizer
from gemexport.formats.checkpoint import read_config
from gemexport.formats.gemma import facts
from gemexport.formats.gemma.architecture import Architecture
from gemexport.formats.gemma.embedder import MODULES
from gemexport.formats.gemma.facts import config_label, flat_facts, gguf_label
from gemexport.formats.gemma.families import family_of
from gemexport.formats.gemma.model import Model, architecture, describe
from gemexport.shared.measured import FactReport
from gemexport.validators.checks.vocabulary import GENAI, settings_of

Label = Callable[[str, bool], str]  # what a format calls a fact, of sliding layers or not
# What every program that reads genai_config.json feeds and fetches by name; "%d" is a layer's number.
GENAI_NAMES = {
    "inputs": ("input_ids", "past_key_names", "past_value_names"),
    "outputs": ("logits", "present_key_names", "present_value_names"),
}
# Told by the tokenizer, or following from others.
NOT_COMPARED = frozenset(("bos_token_id", "eos_token_ids", "pad_token_id", "index"))
# GGUF keeps f32, whose last bit is 6e-8 of the number.
ALIKE = 1e-6


def differences(target: str, path: Path, model: Model) -> tuple[FactReport, ...]:
    """Every fact that the artefact at `path` states otherwise than the checkpoint.

    Raises InputError for metadata that are damaged or contradict each other.
    """
    if target == "coreml":
        return tuple(_core_ml(path, model.decoder))
    if target == "onnx":
        return (*_genai(path, model.decoder), *_config(path, model))
    if target == "gguf":
        return tuple(_decoders(model, _gguf(path), _gguf_label(model)))
    return tuple(_config(path, model))


def activation_differences(model: Activations | None, stored: Activations | None) -> tuple[FactReport, ...]:
    """Static scales that an artefact computes with, of which the checkpoint has others; none if it has none at all."""
    if not model or not stored:
        return ()
    theirs: dict[str, Any] = {
        **stored.linears,
        **{f"cache of layer {layer}": both for layer, both in stored.caches.items()},
    }
    ours: dict[str, Any] = {
        **model.linears,
        **{f"cache of layer {layer}": both for layer, both in model.caches.items()},
    }
    found = []
    for label in model.differences(stored):
        name, _, side = label.rpartition(", ")
        expected = getattr(ours.get(name, CacheActivations()), side, None)
        found.append(
            FactReport(
                name=f"the activation quantizer of {label}",
                found=_quantizer(getattr(theirs[name], side)),
                expected=_quantizer(expected),
            )
        )
    return tuple(found)


def _quantizer(found: Quantizer | None) -> str:
    if found is None:
        return "none"
    return f"{found.bits} bits, scale {found.scale:.7g}, zero point {found.zero_point}"


def _gguf(path: Path) -> Model:
    from gemexport.formats.gguf import family_of
    from gemexport.formats.gguf.config import config_json, model_of
    from gemexport.formats.gguf.metadata import Metadata
    from gemexport.formats.gguf.parts import read_parts

    parts = read_parts(path)
    return model_of(Metadata(parts.path, parts.metadata, family_of(parts).gguf), config_json(parts))


def _core_ml(path: Path, model: Architecture) -> Iterator[FactReport]:
    """The window, by which whoever runs the package makes the masks; it may leave it out."""
    from gemexport.formats.coreml.package import open_package

    key = "co.huggingface.exporters.sliding_window"
    found = open_package(path).metadata.get(key)
    if found is not None and found != str(model.sliding_window):
        yield FactReport(name=key, found=found, expected=str(model.sliding_window))


def _config(path: Path, model: Model) -> Iterator[FactReport]:
    """The decoder in config.json, where there is one."""
    if (path / "config.json").is_file():
        config = read_config(path)
        if model.embedder is not None and MODULES not in config:  # a graph has in it what follows the decoder
            stored = Model(family_of(config, path), architecture(config, path / "config.json"), model.embedder)
        else:
            stored = describe(config, path / "config.json")
        yield from _decoders(model, stored, config_label)


def _genai(path: Path, model: Architecture) -> Iterator[FactReport]:
    """The sizes and names in genai_config.json, where there is one."""
    said = settings_of(path, GENAI).get("model")
    decoder = said.get("decoder") if isinstance(said, dict) else None
    if not isinstance(said, dict) or not isinstance(decoder, dict):
        return
    yield from _genai_names(path, decoder)
    flat = flat_facts(model)
    for name, key in facts.GENAI.items():
        found, expected = (decoder if "." in key else said).get(key.rpartition(".")[2]), flat[name]
        if found is not None and found not in (expected, len(model.layers)):
            yield FactReport(name=f"genai_config.json: {key}", found=str(found), expected=str(expected))


def _genai_names(path: Path, decoder: dict[str, Any]) -> Iterator[FactReport]:
    """The graph that genai_config.json names, and what it calls the graph's inputs and outputs."""
    from gemexport.formats.onnx import read_model

    name = decoder.get("filename")
    if not isinstance(name, str) or not (path / name).is_file():
        yield FactReport(name=f"{GENAI}: decoder.filename", found=str(name), expected="a graph in the folder")
        return
    graph = read_model(path / name).graph
    for side, values in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        known, given = {value.name for value in values}, decoder.get(side)
        for key in GENAI_NAMES[side]:
            called = given.get(key) if isinstance(given, dict) else None
            if isinstance(called, str) and called.replace("%d", "0") not in known:
                name = f"{GENAI}: decoder.{side}.{key}"
                yield FactReport(name=name, found=called, expected=f"one of the graph's {side}")


def _decoders(model: Model, stored: Model, label: Label) -> Iterator[FactReport]:
    """Facts of the whole decoder, then of its layers, one for each group of layers that differ alike."""
    if model.family.reference_type != stored.family.reference_type:
        yield FactReport(name="family", found=stored.family.name, expected=model.family.name)
    ours, theirs = (one.decoder.model_dump(exclude={"layers"}) for one in (model, stored))
    if model.embedder != stored.embedder:
        yield FactReport(name="what follows the decoder", found=str(stored.embedder), expected=str(model.embedder))
    mine, other = model.decoder.layers, stored.decoder.layers
    slides = any(layer.sliding for layer in (*mine, *other))
    for name, found, expected in _unlike("", theirs, ours):
        if name == "sliding_window" and not slides:
            continue  # of nobody
        yield FactReport(name=label(name, False), found=_text(found), expected=_text(expected))
    if len(mine) != len(other):
        name = label("layers", False)
        yield FactReport(name=name, found=str(len(other)), expected=str(len(mine)))
        return
    groups: dict[tuple[str, str, str], list[int]] = {}
    for layer, stated in zip(mine, other, strict=True):
        for name, found, expected in _unlike("", stated.model_dump(), layer.model_dump()):
            fact = (label(name, layer.sliding), _text(found), _text(expected))
            groups.setdefault(fact, []).append(layer.index)
    for (name, text, wanted), layers in groups.items():
        yield FactReport(name=name, found=text, expected=wanted, layers=tuple(layers))


def _unlike(stem: str, found: Any, expected: Any) -> Iterator[tuple[str, Any, Any]]:
    """The leaves that differ, by dotted name."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key, value in expected.items():
            if key not in NOT_COMPARED:
                yield from _unlike(f"{stem}.{key}" if stem else key, found[key], value)
    elif isinstance(expected, float) and isinstance(found, float):
        if not math.isclose(found, expected, rel_tol=ALIKE):
            yield stem, found, expected
    elif found != expected:
        yield stem, found, expected


def _gguf_label(model: Model) -> Label:
    """The keys of a GGUF file of this model."""
    family = model.family
    return lambda name, sliding: gguf_label(family.facts, name, sliding).format(arch=family.gguf)


def _text(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)
