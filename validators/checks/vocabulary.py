"""What an artefact's files say of its tokenizer against the checkpoint's: pieces, kinds, merges, special ids, flags.

Texts can only sample a tokenizer. Its tables can be compared whole, and what is wrong in them can be named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from gemexport.formats.assets.reading import read_tokenizer, uncollected
from gemexport.formats.checkpoint import is_gguf
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.reading import read_optional_json

SPACE, MASK = "▁", "<mask>"
NORMAL, BYTE, ADDED, SPECIAL, NONE = "normal", "byte", "added", "special", "no token"
NAMES = ("bos", "eos", "unk", "pad")
# llama.cpp ends an answer at these whatever the file says (src/llama-vocab.cpp).
ENDS = ("<eos>", "<end_of_turn>", "<turn|>")
FLAGS = {"add_bos": "add_bos_token", "add_eos": "add_eos_token", "prefix": "add_space_prefix"}
GENERATION, GENAI = "generation_config.json", "genai_config.json"
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
LARGEST = 1 << 24  # of a vocabulary: a list is made of that length
Merge = tuple[str, str]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tables; what a format does not hold is None."""

    pieces: list[str]  # by id; empty where there is no token
    kinds: list[str]
    merges: list[Merge] | None = None
    scores: np.ndarray | None = None  # by id: the union with the highest is joined first
    ids: Mapping[str, int | None] = field(default_factory=dict)  # of NAMES
    stops: frozenset[int] = frozenset()
    add_bos: bool | None = None
    add_eos: bool | None = None
    stated: bool = True  # both, by the tokenizer's own table
    keys: str = ""  # what the names of flags begin with where they are stored
    prefix: bool = False  # whether a space is put before a text
    visible: frozenset[str] = frozenset()  # special tokens that the format wants typed as added ones
    sampling: Mapping[str, float] = field(default_factory=dict)  # of SAMPLING, what is given

    def kind(self, index: int) -> str:
        """What a token is."""
        return self.kinds[index] if 0 <= index < len(self.kinds) else NONE

    def token(self, index: int) -> str:
        """A token and what it is, for a sentence."""
        if not 0 <= index < len(self.pieces) or not self.pieces[index]:
            return NONE
        return f"{self.pieces[index]!r}, {self.kinds[index]}"


def read(path: Path) -> Vocabulary:
    """The tables in a folder's tokenizer.json and the settings beside it, or in a GGUF file's metadata.

    Raises InputError where they cannot be read.
    """
    return _gguf(path) if is_gguf(path) else _folder(path)


def compare(expected: Vocabulary, found: Vocabulary, size: int) -> tuple[str, ...]:
    """A sentence for each way in which the tokens `0 … size - 1` or the settings differ; empty where they do not."""
    tables = (_pieces(expected, found, size), _kinds(expected, found, size), _joins(expected, found, size))
    return tuple(sentence for part in (*tables, _settings(expected, found)) for sentence in part)


def settings_of(folder: Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    """A JSON object in a folder, empty where there is no such file; InputError for one that is broken."""
    return read_optional_json(folder / name, "save the tokenizer again")


def content(token: Any) -> str | None:
    """The text of a special token in tokenizer_config.json: a string, or an object with `content`."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _folder(folder: Path) -> Vocabulary:
    source = read_tokenizer(folder / "tokenizer.json")
    settings, generation = settings_of(folder), settings_of(folder, GENERATION)
    with uncollected():
        known: dict[str, int] = dict(source["model"]["vocab"])
        added = {int(item["id"]): item for item in source.get("added_tokens") or ()}
        count = max([*known.values(), *added], default=-1) + 1
        if count > LARGEST:
            problem = f"has the token id {count - 1}, more than any vocabulary has"
            raise InputError(folder / "tokenizer.json", problem, "save the tokenizer again")
        pieces, kinds = [""] * count, [NONE] * count
        for text, index in known.items():
            pieces[index] = text
            kinds[index] = BYTE if text[:3] == "<0x" and _is_byte(text) else NORMAL
        for index, item in added.items():
            pieces[index] = item["content"]
            kinds[index] = SPECIAL if item.get("special") else ADDED
        merges = [_pair(m) if isinstance(m, str) else (m[0], m[1]) for m in source["model"].get("merges") or ()]
    placed = {item["content"]: index for index, item in sorted(added.items())}

    def index_of(text: str | None) -> int | None:
        found = [index for index in (known.get(text or ""), placed.get(text or "")) if index is not None]
        return max((index for index in found if text and pieces[index] == text), default=None)

    named = {name: index_of(content(settings.get(f"{name}_token"))) for name in NAMES}
    if named["unk"] is None:
        named["unk"] = index_of(source["model"].get("unk_token"))
    return Vocabulary(
        pieces,
        kinds,
        merges,
        None,
        named,
        _stops(folder, generation, named["eos"]),
        *_around(source, settings, named),
        prefix=_prefixed(source),
        sampling=_sampling(folder, generation),
    )


def _pair(merge: str) -> Merge:
    first, _, second = merge.partition(" ")
    return first, second


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def settings_differ(expected: Path, found: Path) -> bool:
    """Whether two folders say otherwise where an answer ends or how tokens are chosen; not where `found` says nothing.

    Of folders whose generation_config.json are copies: other files may say it too.
    """
    ours, theirs = (_stops(folder, settings_of(folder, GENERATION), None) for folder in (expected, found))
    lines = _other_sampling(*(_sampling(folder, settings_of(folder, GENERATION)) for folder in (expected, found)))
    return (bool(theirs) and ours != theirs) or any(lines)


def _sampling(folder: Path, generation: Mapping[str, Any]) -> dict[str, float]:
    """How tokens are chosen, as the program reads it that runs the folder; nothing where the likeliest always is."""
    search = settings_of(folder, GENAI).get("search")
    given = search if isinstance(search, dict) else generation
    if given.get("do_sample") is False:
        return {}
    return {name: value for name in SAMPLING if isinstance(value := given.get(name), (int, float))}


def _other_sampling(expected: Mapping[str, float], found: Mapping[str, float]) -> Iterator[str]:
    """What is given on both sides, otherwise; GGUF keeps f32."""
    for name in expected:
        if name in found and not math.isclose(expected[name], found[name], rel_tol=1e-6):
            yield f"{name} is {expected[name]:g} in the checkpoint, {found[name]:g} in the artefact"


def _stops(folder: Path, generation: Mapping[str, Any], eos: int | None) -> frozenset[int]:
    """Where an answer ends, as the program reads it that runs the folder.

    onnxruntime-genai knows its own file alone; else generation_config.json says it, or else config.json, or else the
    tokenizer's EOS.
    """
    model = settings_of(folder, GENAI).get("model")
    listed = model.get("eos_token_id") if isinstance(model, dict) else generation.get("eos_token_id")
    if listed is None:
        config = settings_of(folder, "config.json")
        listed = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    found = [listed] if isinstance(listed, int) else listed if isinstance(listed, list) else []
    return frozenset(found or ([] if eos is None else [eos]))


def read_stops(folder: Path) -> frozenset[int]:
    """Where an answer ends, as the program reads it that runs the folder; none where only the tokenizer says it."""
    return _stops(folder, settings_of(folder, GENERATION), None)


def _prefixed(source: Mapping[str, Any]) -> bool:
    normalizer = source.get("normalizer") or {}
    return any(step.get("type") == "Prepend" for step in normalizer.get("normalizers", [normalizer]))


def _around(
    source: Mapping[str, Any], settings: Mapping[str, Any], named: Mapping[str, int | None]
) -> tuple[bool, bool, bool]:
    """Whether BOS is put before a text, EOS behind it, and whether it is tokenizer.json that says so."""
    processor = source.get("post_processor") or {}
    steps = [processor, *processor.get("processors", [])]
    template = next((step for step in steps if step.get("type") == "TemplateProcessing"), None)
    if template is None:
        # transformers may make one of these when it loads the tokenizer; other programs take the file as it is.
        return bool(settings.get("add_bos_token", False)), bool(settings.get("add_eos_token", False)), False
    known = template.get("special_tokens") or {}
    used = [
        known.get(item["SpecialToken"]["id"], {}).get("ids", []) if "SpecialToken" in item else None
        for item in template.get("single") or ()
    ]
    middle = used.index(None) if None in used else len(used)
    before, behind = used[:middle], used[middle + 1 :]
    adds = [any(named[name] in (ids or ()) for ids in part) for name, part in (("bos", before), ("eos", behind))]
    return adds[0] and settings.get("add_bos_token") is not False, adds[1], True


def _gguf(path: Path) -> Vocabulary:
    """The tables of a GGUF file; InputError for an algorithm that is none of Gemma's."""
    from gguf.constants import Keys, TokenType

    from gemexport.formats.gguf import family_of
    from gemexport.formats.gguf import vocabulary as stored
    from gemexport.formats.gguf.config import EOS_IDS
    from gemexport.formats.gguf.metadata import Metadata
    from gemexport.formats.gguf.parts import read_parts

    parts = read_parts(path)
    facts = Metadata(parts.path, parts.metadata, family_of(parts).gguf)
    size = len(facts.texts(Keys.Tokenizer.LIST))
    stored.check(facts, size)
    key = Keys.Tokenizer
    names = {
        int(TokenType.NORMAL): NORMAL, int(TokenType.BYTE): BYTE, int(TokenType.USER_DEFINED): ADDED,
        int(TokenType.CONTROL): SPECIAL, int(TokenType.UNKNOWN): SPECIAL, int(TokenType.UNUSED): NONE,
    }  # fmt: skip
    with uncollected():
        tables = stored.vocabulary(facts, size)
        scored = facts.text(key.MODEL) == stored.SENTENCEPIECE
        merges = None if scored else [_pair(merge) for merge in facts.texts(key.MERGES)]
        scores = np.array(facts.array(key.SCORES, size, "fiu", "scores"), np.float64) if scored else None
    ids = {
        name: facts.index(which, size)
        for name, which in zip(NAMES, (key.BOS_ID, key.EOS_ID, key.UNK_ID, key.PAD_ID), strict=True)
    }
    stops = {facts.index(which, size) for which in (key.EOS_ID, key.EOT_ID, key.EOM_ID)}
    stops |= {int(index) for index in parts.metadata[EOS_IDS]} if facts.has_array(EOS_IDS) else set()
    stops |= {index for index, text in enumerate(tables.texts) if text in ENDS}
    return Vocabulary(
        tables.texts,
        [names.get(kind, f"type {kind}") for kind in tables.kinds],
        merges,
        scores,
        ids,
        frozenset(stop for stop in stops if stop is not None),
        facts.flag(key.ADD_BOS, scored),
        facts.flag(key.ADD_EOS, False),
        keys="tokenizer.ggml.",
        prefix=facts.flag(key.ADD_PREFIX, scored),
        visible=stored.VISIBLE,
        sampling={name: facts.number(key) for key, name in stored.SAMPLING.items() if facts.has(key)},
    )


def _several(wrong: Sequence[int], what: str, expected: Vocabulary, found: Vocabulary) -> str:
    """A sentence on ids, the first of them shown."""
    first = wrong[0]
    many = f"{len(wrong)} ids {what}, the first is {first}" if len(wrong) > 1 else f"id {first} {what}"
    return f"{many}: {expected.token(first)} in the checkpoint, {found.token(first)} in the artefact"


def _pieces(expected: Vocabulary, found: Vocabulary, size: int) -> Iterator[str]:
    pairs = zip_longest(expected.pieces[:size], found.pieces[:size], fillvalue="")
    wrong = [index for index, (ours, theirs) in enumerate(pairs) if ours != theirs]
    if not wrong:
        return
    ours, theirs = ({*own.pieces[:size]} for own in (expected, found))
    lost, new = sorted(ours - theirs - {""}), sorted(theirs - ours - {""})
    shown = [f"{len(names)} {what} ({names[0]!r})" for names, what in ((lost, "missing"), (new, "unknown")) if names]
    what = "stands for another token" if len(wrong) == 1 else "stand for other tokens"
    yield _several(wrong, what, expected, found) + (f"; {', '.join(shown)}" if shown else "")


def _kinds(expected: Vocabulary, found: Vocabulary, size: int) -> Iterator[str]:
    count = min(len(expected.kinds), len(found.kinds), size)
    wrong = [
        index
        for index in range(count)
        if expected.kinds[index] != found.kinds[index]
        and expected.pieces[index] == found.pieces[index]
        and not _may_be(expected.pieces[index], expected.kinds[index], found.kinds[index], found.visible)
    ]
    if wrong:
        what = "is of another kind" if len(wrong) == 1 else "are of other kinds"
        yield _several(wrong, what, expected, found)


def _may_be(text: str, kind: str, found: str, visible: frozenset[str]) -> bool:
    """Kinds that programs give to a token without a difference to any text.

    A run of spaces is what merges make of spaces, whether or not it is listed as a token of its own. transformers'
    class for Gemma makes the mask special when it loads the checkpoint itself, and saves it so.
    """
    if not text.strip(SPACE):
        return {kind, found} == {NORMAL, ADDED}
    if text == MASK:
        return found in (ADDED, SPECIAL)
    return kind == SPECIAL and found == ADDED and text in visible


def _joins(expected: Vocabulary, found: Vocabulary, size: int) -> Iterator[str]:
    """Merges against merges; against scores, the order in which these would join."""
    if expected.merges is None or expected.merges == found.merges:
        return
    with uncollected():
        if found.merges is not None:
            yield from _merges(_usable(expected, size), found.merges)
        elif found.scores is not None:
            yield from _scores(_order(_usable(expected, size)), found)


def _usable(expected: Vocabulary, size: int) -> list[Merge]:
    """Merges of tokens that have rows, in order; a text with a space in it is no token of Gemma's."""
    known = set(expected.pieces[:size])
    assert expected.merges is not None
    return [(a, b) for a, b in expected.merges if a + b in known and " " not in a and " " not in b]


def _order(merges: Iterable[Merge]) -> list[str]:
    """What merges make, first come first; runs of one character compete only with themselves and are left out."""
    return [text for text in dict.fromkeys(a + b for a, b in merges) if text.strip(text[0])]


def _merges(expected: list[Merge], found: list[Merge]) -> Iterator[str]:
    ours, theirs = set(expected), set(found)
    for names, what in ((ours - theirs, "missing"), (theirs - ours, "not the checkpoint's")):
        if names:
            source = expected if what == "missing" else found
            first = next(pair for pair in source if pair in names)
            many = "merges are" if len(names) > 1 else "merge is"
            yield f"{len(names)} {many} {what}: {first[0]!r} + {first[1]!r}"
    if ours != theirs:
        return
    for before, after in zip(_order(expected), _order(found), strict=True):
        if before != after:
            yield f"the merges come in another order: {after!r} is made where the checkpoint makes {before!r}"
            return


def _scores(order: list[str], found: Vocabulary) -> Iterator[str]:
    """Each union must score lower than the one that the checkpoint's merges make before it."""
    ids = {text: index for index, text in enumerate(found.pieces) if found.kinds[index] == NORMAL}
    places = [ids[text] for text in order if text in ids]
    assert found.scores is not None
    scores = found.scores[places]
    wrong = np.flatnonzero(~(scores[1:] < scores[:-1]))
    if len(wrong):
        first, second = (found.pieces[places[int(wrong[0]) + i]] for i in (0, 1))
        yield f"{len(wrong)} score(s) are out of order: {second!r} is joined before {first!r}"


def _settings(expected: Vocabulary, found: Vocabulary) -> Iterator[str]:
    for name in NAMES:
        ours, theirs = expected.ids.get(name), found.ids.get(name)
        # A format's EOS may be any of the tokens at which an answer ends; `stops` has all of them.
        differs = ours is not None and theirs is not None and ours != theirs
        if differs and not (name == "eos" and theirs in expected.stops) and name != "pad":
            yield f"{name.upper()} is {ours} ({expected.token(ours or 0)}) in the checkpoint, {theirs} in the artefact"
        elif name == "bos" and ours is not None and theirs is None:
            yield f"{name.upper()} is {ours} in the checkpoint and not set in the artefact"
    lost = sorted(expected.stops - found.stops)
    if lost and found.stops:
        yield f"an answer does not end at {', '.join(f'{stop} ({expected.token(stop)})' for stop in lost)}"
    elif lost:
        yield "the artefact does not say where an answer ends"
    # An end that the checkpoint has not may be a better one, but not where it is a piece of ordinary text.
    early = sorted(stop for stop in found.stops - expected.stops if expected.kind(stop) in (NORMAL, BYTE))
    if early:
        yield f"an answer ends at {', '.join(f'{stop} ({expected.token(stop)})' for stop in early)}"
    yield from _other_sampling(expected.sampling, found.sampling)
    for flag, what in (
        ("add_bos", "BOS is put before a text"),
        ("add_eos", "EOS is put behind a text"),
        ("prefix", "a space is put before a text"),
    ):
        ours, theirs = getattr(expected, flag), getattr(found, flag)
        theirs = theirs and (found.stated or not expected.stated or flag == "prefix")
        if ours is not None and theirs is not None and ours != theirs:
            by = "by the checkpoint and not by the artefact" if ours else "by the artefact alone"
            yield f"{what} {by} ({found.keys}{FLAGS[flag]})"
