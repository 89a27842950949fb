"""What a program reads in an artefact's settings besides the decoder: special tokens, dtype, cache sizes, sampling.

transformers, mlx-lm, vLLM, Optimum and transformers.js take BOS, EOS, padding and the dtype from config.json,
transformers and vLLM how tokens are chosen from generation_config.json, and onnxruntime-genai all that it knows from a
file of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.architecture import Architecture
from gemexport.formats.gemma.dtypes import stated_dtype
from gemexport.formats.gemma.families import FAMILIES
from gemexport.formats.stamps import WEIGHTS
from gemexport.formats.storage.safetensors import weight_files
from gemexport.shared.measured import FactReport
from gemexport.validators.checks import vocabulary
from gemexport.validators.checks.vocabulary import GENAI, GENERATION, settings_of

# Of config.json, largest number first: hidden states of a Gemma do not fit into f16.
REACH = {"float32": 2, "float": 2, "bfloat16": 2, "float16": 1, "half": 1}
CONFIG, PAD = "config.json", "pad_token_id"
# What transformers does where generation_config.json does not say it, as libraries that write one leave it out.
SAMPLING = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
# What it may call a model, by which it knows how to feed one.
GENAI_TYPES = frozenset(name for one in FAMILIES for name in (one.genai_type, one.name, one.text_type, one.whole_type))


def setting_differences(checkpoint: Checkpoint, path: Path) -> tuple[FactReport, ...]:
    """Every setting beside the decoder's facts that the folder at `path` has otherwise; none of a file.

    Raises InputError for files that are broken.
    """
    if not path.is_dir():
        return ()
    inside = path.suffix != ".mlpackage" or (path / GENERATION).is_file()
    chosen = tuple(_sampling(checkpoint, path if inside else path.parent))
    if not any((path / name).is_file() for name in (CONFIG, GENAI)):
        return chosen
    return (*_files(path), *_config(checkpoint, path), *_genai(checkpoint, path), *chosen)


def _files(path: Path) -> Iterator[FactReport]:
    """Weights beside the model's: mlx-lm takes every file whose name begins so, vLLM every one without an index."""
    known = {name for name in weight_files(path) if name.endswith(WEIGHTS)}
    found = {file.name for file in path.glob(f"*{WEIGHTS}") if not file.name.startswith("adapter")}
    if found & known and found > known:
        names = [", ".join(sorted(names)) for names in (found, known)]
        yield FactReport(name="the files of weights that programs read", found=names[0], expected=names[1])


def _stops(checkpoint: Checkpoint) -> frozenset[int]:
    """The tokens at which an answer of the checkpoint ends."""
    return vocabulary.read_stops(checkpoint.assets) | frozenset(checkpoint.architecture.eos_token_ids)


def _config(checkpoint: Checkpoint, path: Path) -> Iterator[FactReport]:
    config, decoder = settings_of(path, CONFIG), checkpoint.architecture
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        yield from _bos("", part, decoder)
        yield from _pad(part, checkpoint)
        listed = _ids(part.get("eos_token_id"))
        ends = _stops(checkpoint)
        if listed and ends and not listed <= ends:
            yield FactReport(name="eos_token_id", found=_shown(listed), expected=f"some of {_shown(ends)}")
        yield from _dtype(part, checkpoint.text_config, checkpoint.config)


def _bos(stem: str, said: Mapping[str, Any], decoder: Architecture) -> Iterator[FactReport]:
    key, expected = "bos_token_id", decoder.bos_token_id
    found = said.get(key)
    if isinstance(found, int) and expected is not None and found != expected:
        yield FactReport(name=f"{stem}{key}", found=str(found), expected=str(expected))


def _pad(said: Mapping[str, Any], checkpoint: Checkpoint) -> Iterator[FactReport]:
    listed = (checkpoint.architecture.pad_token_id, checkpoint.config.get(PAD), checkpoint.text_config.get(PAD))
    expected, found = {number for number in listed if isinstance(number, int)}, said.get(PAD)
    if isinstance(found, int) and expected and found not in expected:
        yield FactReport(name=PAD, found=str(found), expected=_shown(expected))


def _sampling(checkpoint: Checkpoint, folder: Path) -> Iterator[FactReport]:
    """How generation_config.json says that tokens are chosen, where the checkpoint's and the artefact's say so."""
    if not (folder / GENERATION).is_file():
        return
    ours, theirs = settings_of(checkpoint.assets, GENERATION), settings_of(folder, GENERATION)
    if not any(name in ours for name in SAMPLING):
        return
    for name, usual in SAMPLING.items():
        expected, found = (usual if said.get(name) is None else said[name] for said in (ours, theirs))
        if found != expected:
            text = f"{found}" if theirs.get(name) is not None else f"not given ({found})"
            yield FactReport(name=f"{GENERATION}: {name}", found=text, expected=str(expected))


def _dtype(said: Mapping[str, Any], *ours: Mapping[str, Any]) -> Iterator[FactReport]:
    """A dtype that reaches less far than the checkpoint's, in which the same weights may give no numbers."""
    found, own = stated_dtype(said), stated_dtype(*ours) or "bfloat16"
    if found in REACH and REACH[found] < REACH.get(own, 0):
        yield FactReport(name="dtype", found=found, expected=own)


def _genai(checkpoint: Checkpoint, path: Path) -> Iterator[FactReport]:
    """Sizes by which onnxruntime-genai makes its caches and ends its answers."""
    said = settings_of(path, GENAI).get("model")
    inner = said.get("decoder") if isinstance(said, dict) else None
    if not isinstance(said, dict) or not isinstance(inner, dict):
        return
    decoder, kind = checkpoint.architecture, said.get("type")
    yield from _bos(f"{GENAI}: ", said, decoder)
    if kind not in GENAI_TYPES:
        expected = checkpoint.model.family.genai_type
        yield FactReport(name=f"{GENAI}: type", found=str(kind), expected=expected)
    owners = [layer for layer in decoder.layers if layer.owns_cache]
    for key, part, wanted in (
        ("context_length", said, {decoder.max_positions}),
        ("head_size", inner, {layer.head_dim for layer in owners}),
        ("num_key_value_heads", inner, {layer.kv_heads for layer in owners}),
    ):
        found = part.get(key)
        if found is not None and found not in wanted:
            label = key if part is said else f"decoder.{key}"
            yield FactReport(name=f"{GENAI}: {label}", found=str(found), expected=_shown(wanted))
    yield from _search(checkpoint, settings_of(path, GENAI).get("search"))


def _search(checkpoint: Checkpoint, said: Any) -> Iterator[FactReport]:
    """How far onnxruntime-genai goes on, and whether it samples: it takes the likeliest token unless it is told to.

    With what it samples is compared with the tokenizer's settings.
    """
    if not isinstance(said, dict):
        return
    limit, longest = said.get("max_length"), checkpoint.architecture.max_positions
    if isinstance(limit, int) and limit > longest:
        yield FactReport(name=f"{GENAI}: search.max_length", found=str(limit), expected=str(longest))
    ours, key = settings_of(checkpoint.assets, GENERATION), "do_sample"
    if any(name in ours for name in SAMPLING):
        expected, found = bool(ours.get(key)), said.get(key)
        if bool(found) != expected:
            text = "not given (False)" if found is None else str(found)
            yield FactReport(name=f"{GENAI}: search.{key}", found=text, expected=str(expected))


def _ids(listed: Any) -> frozenset[int]:
    return frozenset(listed if isinstance(listed, list) else [listed] if isinstance(listed, int) else [])


def _shown(numbers: frozenset[int] | set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))
