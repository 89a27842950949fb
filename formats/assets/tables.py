"""tokenizer.json: what it must be to be a Gemma's, judged before anything is made of it.

The tokenizers library reads most of what is wrong here without a word, or ends with an exception's name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.limited import ExceededError, call

REMEDY = "use the tokenizer.json that came with the model"
MAX_ID = 1 << 24  # of a token: lists are made of that length
MAX_ADDED = 1 << 16  # tokens found before merging: Gemma has 6,415
MAX_GROWTH = 100  # how much longer a normalizer may make a text: NFKD makes one character 18
MAX_TEMPLATE = 64  # tokens put around a text
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_STEPS = ("normalizer", "pre_tokenizer", "decoder")
# Texts that patterns take long for when they take long for any.
_PROBES = ("a" * 4000, " " * 4000, "ab" * 2000 + "!", "\n" * 2000, "a1 .,-_=" * 500, "é😊日本" * 500)


def check_types(path: Path, source: Any) -> None:
    """Raise InputError unless the parts of a tokenizer.json that are read here are what they should be."""
    model = source.get("model") if isinstance(source, dict) else None
    if not isinstance(model, dict) or "vocab" not in model or not isinstance(model.get("type", "BPE"), str):
        raise InputError(path, "is not a tokenizer of the tokenizers library", REMEDY)
    vocab, merges, added = model["vocab"], model.get("merges") or [], source.get("added_tokens") or []
    if not isinstance(vocab, dict) or not set(map(type, vocab.values())) <= {int}:
        raise InputError(path, "model.vocab is no object of ids by token", REMEDY)
    if not isinstance(merges, list) or not (_are_pairs(merges) or all(map(_is_merge, merges))):
        raise InputError(path, "model.merges is no list of pairs of tokens", REMEDY)
    if not isinstance(added, list) or not all(map(_is_added, added)):
        raise InputError(path, "added_tokens is no list of objects with an id and a content", REMEDY)
    for key in (*_STEPS, "post_processor", "truncation", "padding"):
        if not isinstance(source.get(key) or {}, dict):
            raise InputError(path, f"{key} is no object", REMEDY)
    if len(added) > MAX_ADDED:
        raise InputError(path, f"added_tokens has {len(added)} tokens, more than {MAX_ADDED}", REMEDY)
    ids = [*vocab.values(), *(item["id"] for item in added)]
    if ids and not 0 <= min(ids) <= max(ids) < MAX_ID:
        strange = min(ids) if min(ids) < 0 else max(ids)
        raise InputError(path, f"has the token id {strange}, which should be from 0 to {MAX_ID - 1}", REMEDY)


def _are_pairs(merges: list[Any]) -> bool:
    """Whether all are lists of two strings, as today's libraries write them; half a million are looked at in C."""
    return (
        set(map(type, merges)) <= {list}
        and set(map(len, merges)) <= {2}
        and set(map(type, chain.from_iterable(merges))) <= {str}
    )


def _is_merge(merge: Any) -> bool:
    if type(merge) is str:
        return " " in merge
    return type(merge) is list and len(merge) == 2 and type(merge[0]) is str and type(merge[1]) is str


def _is_added(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and type(item.get("id")) is int
        and isinstance(item.get("content"), str)
        and isinstance(item.get("special", False), bool)
    )


def check(path: Path, source: Mapping[str, Any]) -> None:
    """Raise InputError for a tokenizer that is not whole, or whose steps cannot be computed in bounded time and memory.

    `source` has passed `check_types`.
    """
    model = source["model"]
    if model.get("type") == "BPE":
        for problem in _incomplete(model):
            raise InputError(path, problem, REMEDY)
    for problem in _contradictions(source):
        raise InputError(path, problem, REMEDY)
    for step in _STEPS:
        if (times := _growth(source.get(step) or {})) > MAX_GROWTH:
            raise InputError(path, f"its {step} makes a text up to {times:.3g} times as long", REMEDY)
    processor = source.get("post_processor") or {}
    if max((len(part) for part in _templates(processor)), default=0) > MAX_TEMPLATE:
        raise InputError(path, f"its post_processor puts more than {MAX_TEMPLATE} tokens around a text", REMEDY)
    _check_steps(path, source)


def _incomplete(model: Mapping[str, Any]) -> Iterator[str]:
    """What BPE over bytes cannot do without."""
    vocab = model["vocab"]
    if not model.get("byte_fallback"):
        return  # whoever writes it says that it is none of Gemma's
    missing = [text for text in _BYTES if text not in vocab]
    if missing:
        yield f"falls back to bytes, and has no token for {len(missing)} of them ({missing[0]} …)"
    if not isinstance(model.get("unk_token"), str) or model["unk_token"] not in vocab:
        yield f"model.unk_token is {model.get('unk_token')!r}, which is no token"


def _contradictions(source: Mapping[str, Any]) -> Iterator[str]:
    """Ids of two tokens, and merges of what is none."""
    vocab: dict[str, int] = source["model"]["vocab"]
    texts = {index: text for text, index in vocab.items()}
    if len(texts) != len(vocab):
        text, index = next((text, index) for text, index in vocab.items() if texts[index] != text)
        yield f"model.vocab has the id {index} twice, for {text!r} and {texts[index]!r}"
    for item in source.get("added_tokens") or ():
        other = texts.setdefault(item["id"], item["content"])
        if other != item["content"]:
            yield f"the id {item['id']} is of two tokens, {other!r} and {item['content']!r}"
    merges: list[Any] = source["model"].get("merges") or []
    split = str in set(map(type, merges))
    pairs = [merge if type(merge) is list else merge.split(" ", 1) for merge in merges] if split else merges
    known = vocab.__contains__
    if not (all(map(known, chain.from_iterable(pairs))) and all(map(known, map("".join, pairs)))):
        first, second = next(pair for pair in pairs if not all(map(known, (*pair, "".join(pair)))))
        yield f"model.merges has {first!r} and {second!r}, which are not two tokens that make a third"


def _growth(step: Mapping[str, Any]) -> float:
    """How many times as long a step may make a text, at most."""
    inner = step.get("normalizers") or step.get("pretokenizers") or step.get("decoders") or ()
    total = 1.0
    for part in inner if isinstance(inner, list) else ():
        total *= _growth(part) if isinstance(part, dict) else 1.0
    content, pattern = step.get("content"), step.get("pattern")
    if isinstance(content, str) and step.get("type") == "Replace":
        said = pattern.get("String") if isinstance(pattern, dict) else None
        total *= max(1.0, len(content) / max(1, len(said) if isinstance(said, str) else 1))
    if isinstance(prefix := step.get("prepend"), str):
        total *= 1.0 + len(prefix) / 16
    return total


def _templates(processor: Mapping[str, Any]) -> Iterator[list[Any]]:
    for step in (processor, *(processor.get("processors") or ())):
        for key in ("single", "pair"):
            if isinstance(step, dict) and isinstance(step.get(key), list):
                yield step[key]


def _skeleton(source: Mapping[str, Any]) -> str:
    """The tokenizer with a vocabulary of bytes alone: what its steps do, without reading its tables."""
    model = {"type": "BPE", "byte_fallback": True, "vocab": {text: i for i, text in enumerate(_BYTES)}, "merges": []}
    kept = {key: source.get(key) for key in (*_STEPS, "post_processor")}
    return json.dumps(
        {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], **kept, "model": model}
    )


def _check_steps(path: Path, source: Mapping[str, Any]) -> None:
    """Raise InputError for steps that the tokenizers library does not read, and for patterns that never end."""
    skeleton = _skeleton(source)
    try:
        load: Callable[[str], Any] = _load if '"Regex"' not in skeleton else lambda text: call(__name__, text)
        problem = load(skeleton)
    except ExceededError as error:
        raise InputError(path, f"a regular expression in it {error} for a page of text", REMEDY) from error
    if problem:
        raise InputError(path, f"cannot be read by the tokenizers library ({problem})", REMEDY)


def _load(skeleton: str) -> str | None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(skeleton)
    except Exception as error:  # the library has no class for it
        return str(error)
    return None


def answer(skeleton: str) -> str | None:
    """What is wrong with a tokenizer's steps; None for nothing. Runs in a process with limits."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(skeleton)
        for text in _PROBES:
            tokenizer.decode(tokenizer.encode(text).ids)
    except MemoryError:
        raise
    except BaseException as error:  # a panic of the library is no Exception
        return str(error)
    return None
