"""Facts of a decoder as a GGUF file's metadata have them, by the rows of its family (`formats.gemma.facts`)."""

from __future__ import annotations

from typing import Any

from gemexport.formats.gemma.facts import Fact, Flat, Form
from gemexport.formats.gemma.families.family import Family
from gemexport.formats.gguf.container import Value, boolean, float32, string, uint32
from gemexport.formats.gguf.metadata import Metadata


def stated(family: Family[Any], flat: Flat) -> dict[str, Value]:
    """Keys and values of these facts, in the order in which they are written."""
    return {fact.gguf: _value(fact, flat[fact.name]) for fact in family.facts if fact.is_written(flat)}


def read_facts(family: Family[Any], metadata: Metadata, layers: int) -> Flat:
    """The facts of a file of `layers` layers; what it does not say is what llama.cpp takes then.

    Raises InputError for a value of another form, and for two keys that say one fact in two ways.
    """
    flat: Flat = {"layers": layers, **family.built_in(layers)}
    for fact in family.facts:
        value = _read(fact, metadata, flat) if fact.is_said(flat) else fact.default(flat)
        known = flat.setdefault(fact.name, value)
        if value != known:
            raise metadata.wrong(fact.gguf, f"{known}, as another key says")
    return flat


def _value(fact: Fact, value: Any) -> Value:
    """A value in the type that llama.cpp reads it in."""
    if fact.form is Form.COUNTS:  # a single number when all layers agree, as other converters write it
        return uint32(value[0] if len(set(value)) == 1 else value)
    if fact.form in (Form.FLAGS, Form.PERIOD):
        return boolean(value)
    if fact.form is Form.TEXT:
        return string(value)
    if fact.form in (Form.COUNT, Form.COUNT_OR_NONE):
        return uint32(value)
    return float32(value or 0.0)


def _read(fact: Fact, metadata: Metadata, flat: Flat) -> Any:
    """What the file says, or what its absence means."""
    key = next((key for key in (fact.gguf, *fact.others) if metadata.has(key)), fact.gguf)
    default, layers = fact.default(flat), flat["layers"]
    if fact.form is Form.COUNTS:
        return metadata.counts(key, layers) if metadata.has(key) or default is None else default
    if fact.form is Form.FLAGS or (fact.form is Form.PERIOD and metadata.has_array(key)):
        flags = metadata.array(key, layers, "biu", "truth values, one a layer of block_count")
        return [bool(flag) for flag in flags]
    if fact.form is Form.PERIOD:
        if not metadata.has(key):
            return default
        period = metadata.count(key, least=0)
        return [period == 0 or (index + 1) % period != 0 for index in range(layers)]
    if fact.form is Form.TEXT:
        return metadata.text(key, default)
    if fact.form in (Form.COUNT, Form.COUNT_OR_NONE):
        return metadata.count(key, default, least=0 if fact.form is Form.COUNT_OR_NONE else 1)
    if fact.form is Form.POSITIVE:
        return metadata.positive(key, default)
    number = metadata.number(key, 0.0 if default is None else default)
    if fact.form is Form.CAP and number < 0:
        raise metadata.wrong(key, "0 or more")
    return (number or None) if fact.form is Form.CAP else number
