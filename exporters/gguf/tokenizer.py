"""A checkpoint's tokenizer as GGUF metadata: tokenizer.json is enough, no tokenizer.model is needed.

Gemma's tokenizer is BPE over the whole text with "▁" for a space and bytes as fallback. llama.cpp has two algorithms
for that: "llama" (SentencePiece: join the neighbours whose union is the best-scored token) and "gemma4" (join by the
list of merges). The first gives the same tokens only if the merges are those of a SentencePiece model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import Keys, TokenType
from numpy.typing import NDArray

from gemexport.exporters.streaming import read_settings
from gemexport.formats.assets.reading import read_tokenizer, uncollected
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gguf.config import EOS_IDS, TURN_ENDS
from gemexport.formats.gguf.container import Packed, Value, boolean, float32, int32, string, uint32
from gemexport.formats.gguf.vocabulary import SAMPLING, SPACE, VISIBLE
from gemexport.formats.grids.lattice import jit
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.reading import read_text

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
KNOWN_ENDS = ("<eos>", *TURN_ENDS)  # llama.cpp ends an answer at these, whatever the keys say
LOWEST_SCORE = -1e6  # below that of any merged token: for tokens that no merge makes


@dataclass
class Vocabulary:
    """Tokens by id, as many as the model has rows."""

    texts: list[str]
    types: list[TokenType]
    notes: list[str] = field(default_factory=list)


def tokenizer(checkpoint: Checkpoint) -> tuple[dict[str, Value], list[str]]:
    """The tokenizer's metadata, and what is worth a note.

    Raises InputError for a tokenizer that is not BPE with bytes as fallback.
    """
    path = checkpoint.assets / "tokenizer.json"
    source = read_tokenizer(path)
    model = source["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        problem = "is not BPE with bytes as fallback, which is what a Gemma decoder has"
        raise InputError(path, problem, "use the tokenizer.json that came with the model")
    settings = read_settings(checkpoint.assets / "tokenizer_config.json")
    with uncollected():
        vocabulary = build_vocabulary(source, checkpoint.architecture.vocab_size)
        merges = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]]
        values, notes = _model(vocabulary, merges, checkpoint.model.family.sentencepiece)
    generation = read_settings(checkpoint.assets / "generation_config.json")
    values |= _special(checkpoint, source, settings, generation, vocabulary)
    values |= sampling(generation)
    values |= _chat_template(checkpoint.assets, settings)
    return values, [*vocabulary.notes, *_foreign(source), *notes, *_unsaid(values, vocabulary)]


_PACKED: dict[str, Packed] = {}  # of the last checkpoint whose size was asked


def packed(checkpoint: Checkpoint) -> Packed:
    """`tokenizer`'s metadata as bytes, kept for who asks for many sizes: 33 MB of JSON take seconds."""
    key = f"{checkpoint.path} {checkpoint.assets} {checkpoint.architecture.vocab_size}\n{checkpoint.facts()}"
    if key not in _PACKED:
        found = Packed.of(tokenizer(checkpoint)[0])
        _PACKED.clear()
        _PACKED[key] = found
    return _PACKED[key]


def build_vocabulary(source: Mapping[str, Any], size: int) -> Vocabulary:
    """The tokens `0 … size - 1` of a tokenizer.json; surplus ones are left out, missing ones filled in, both noted."""
    known: dict[str, int] = dict(source["model"]["vocab"])
    added = {item["content"]: item for item in source.get("added_tokens", [])}
    known |= {text: int(item["id"]) for text, item in added.items()}
    unknown = source["model"].get("unk_token")
    texts: list[str] = [""] * size
    types = [TokenType.UNUSED] * size
    surplus = []
    for text, index in known.items():
        if index >= size:
            surplus.append(f"{text} ({index})")
        else:
            texts[index], types[index] = text, token_type(text, added.get(text), text == unknown)
    empty = [index for index, text in enumerate(texts) if not text]
    for index in empty:
        texts[index] = f"[PAD{index}]"
    notes = []
    if surplus:
        notes.append(f"{len(surplus)} tokens beyond the vocabulary of {size} are left out: {_some(sorted(surplus))}")
    if empty:
        notes.append(f"{len(empty)} ids that the tokenizer does not name are filled with [PADn]")
    return Vocabulary(texts, types, notes)


def token_type(text: str, added: Mapping[str, Any] | None, unknown: bool) -> TokenType:
    """How llama.cpp is to treat a token; `added` is its entry among the added tokens, if it has one."""
    if unknown:
        return TokenType.UNKNOWN
    if added is None:
        return TokenType.BYTE if text.startswith("<0x") and BYTE.fullmatch(text) else TokenType.NORMAL
    if text in VISIBLE:
        return TokenType.USER_DEFINED
    if added.get("special"):
        return TokenType.CONTROL
    # A run of spaces is "▁▁" only after normalisation: as a user-defined token it would match the character "▁" in the
    # text, and be shown as such. The merges make it out of spaces anyway.
    return TokenType.NORMAL if not text.strip(SPACE) else TokenType.USER_DEFINED


def sentencepiece_scores(vocabulary: Vocabulary, merges: Sequence[tuple[str, str]]) -> list[float] | None:
    """Scores with which joining the best-scored neighbours equals joining by `merges`; None when there are none.

    SentencePiece's BPE joins any two neighbours whose union is a token, best score first. It equals a list of merges
    when the list has every such pair, and all pairs that make one token come together: the token's place is its score.
    (Runs of one character come interleaved; they only ever compete with themselves.)
    """
    ranks: dict[str, int] = {}
    previous = ""
    for left, right in merges:
        text = left + right
        if text != previous:
            if text in ranks and len(set(text)) > 1:
                return None
            ranks.setdefault(text, len(ranks))
            previous = text
    normal = (TokenType.NORMAL, TokenType.USER_DEFINED)
    texts = {text for text, kind in zip(vocabulary.texts, vocabulary.types, strict=True) if kind in normal}
    if count_joins(list(texts)) != len(merges) or len(set(merges)) != len(merges):
        return None
    return [-float(ranks[text]) if text in ranks else LOWEST_SCORE for text in vocabulary.texts]


def count_joins(texts: Sequence[str]) -> int:
    """How many pairs out of different `texts`, joined, are one of them.

    Texts are compared by hashes of 64 bits: of Gemma's two million cuts, one in 10**7 vocabularies has one mistaken.
    """
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    return int(_count_joins(characters, np.cumsum([len(text) for text in texts])))


@jit
def _count_joins(characters: NDArray[np.uint32], ends: NDArray[np.int64]) -> int:
    """A polynomial hash gives a suffix from the whole and the prefix: h(ab) = h(a) * base**len(b) + h(b)."""
    base = np.uint64(0x9E3779B97F4A7C15)
    longest, start = 1, 0
    for end in ends:
        longest, start = max(longest, end - start), end
    powers = np.ones(longest + 1, np.uint64)
    for i in range(longest):
        powers[i + 1] = powers[i] * base
    hashes = np.zeros(len(ends), np.uint64)
    start = 0
    for token, end in enumerate(ends):
        for i in range(start, end):
            hashes[token] = hashes[token] * base + np.uint64(characters[i])
        start = end
    known = set(hashes)
    joins, start = 0, 0
    for token, end in enumerate(ends):
        prefix = np.uint64(0)
        for i in range(start, end - 1):
            prefix = prefix * base + np.uint64(characters[i])
            if prefix in known and hashes[token] - prefix * powers[end - 1 - i] in known:
                joins += 1
        start = end
    return joins


def _model(
    vocabulary: Vocabulary, merges: Sequence[tuple[str, str]], expected: bool
) -> tuple[dict[str, Value], list[str]]:
    """The tokenizer's algorithm and tables; `expected`: the family's are of a SentencePiece model."""
    scores = sentencepiece_scores(vocabulary, merges) if expected else None
    notes = []
    values = {
        Keys.Tokenizer.MODEL: string("llama" if scores else "gemma4"),
        Keys.Tokenizer.PRE: string("default" if scores else "gemma4"),
        Keys.Tokenizer.LIST: string(vocabulary.texts),
        Keys.Tokenizer.SCORES: float32(scores or [LOWEST_SCORE] * len(vocabulary.texts)),
        Keys.Tokenizer.TOKEN_TYPE: int32([int(kind) for kind in vocabulary.types]),
    }
    if scores is None:
        known = set(vocabulary.texts)
        usable = [pair for pair in merges if "".join(pair) in known and not any(" " in part for part in pair)]
        if len(usable) != len(merges):
            notes.append(f"{len(merges) - len(usable)} merges make tokens that the vocabulary lacks and are left out")
        values[Keys.Tokenizer.MERGES] = string([" ".join(pair) for pair in usable])
        if expected:
            notes.append("the merges are not those of a SentencePiece model: tokenizer.ggml.model is gemma4")
    return values, notes


def _special(
    checkpoint: Checkpoint,
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    generation: Mapping[str, Any],
    vocabulary: Vocabulary,
) -> dict[str, Value]:
    """Ids of the special tokens, and what is put before a text."""
    decoder = checkpoint.architecture
    ids = {text: index for index, text in enumerate(vocabulary.texts)}
    named = {kind: ids.get(_content(settings.get(f"{kind}_token")) or "") for kind in ("bos", "eos", "unk", "pad")}
    listed = generation.get("eos_token_id")
    stops = [listed] if isinstance(listed, int) else listed or [*decoder.eos_token_ids]
    stops = [stop for stop in stops if 0 <= stop < len(ids)]
    eos = named["eos"] if named["eos"] is not None else next(iter(stops), None)
    others = [stop for stop in stops if stop != eos]
    bos = named["bos"] if named["bos"] is not None else decoder.bos_token_id
    found = {
        Keys.Tokenizer.BOS_ID: bos,
        Keys.Tokenizer.EOS_ID: eos,
        Keys.Tokenizer.EOT_ID: next(iter(others), None),
        Keys.Tokenizer.EOM_ID: next(iter(others[1:]), None),
        Keys.Tokenizer.UNK_ID: named["unk"] if named["unk"] is not None else ids.get(source["model"].get("unk_token")),
        Keys.Tokenizer.PAD_ID: named["pad"] if named["pad"] is not None else decoder.pad_token_id,
    }
    values = {key: uint32(index) for key, index in found.items() if index is not None and 0 <= index < len(ids)}
    ends = [found[key] for key in (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)]
    if len(stops) > len(ends):
        values[EOS_IDS] = uint32(stops)
    elif [end for end in ends if end is not None] != [*decoder.eos_token_ids]:
        values[EOS_IDS] = uint32([index for index in decoder.eos_token_ids if 0 <= index < len(ids)])
    values[Keys.Tokenizer.ADD_BOS] = boolean(_adds_bos(source, settings, bos))
    values[Keys.Tokenizer.ADD_EOS] = boolean(False)
    values[Keys.Tokenizer.ADD_PREFIX] = boolean(False)
    return values


def _unsaid(values: Mapping[str, Value], vocabulary: Vocabulary) -> list[str]:
    """A note on tokens that end an answer and that llama.cpp has no key for, nor knows by their text."""
    if EOS_IDS not in values:
        return []
    keys = (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
    said = [values[key].value for key in keys if key in values]
    left = [index for index in values[EOS_IDS].value if index not in said]
    left = [index for index in left if vocabulary.texts[index] not in KNOWN_ENDS]
    shown = _some([f"{vocabulary.texts[index]} ({index})" for index in left])
    return [f"llama.cpp has no key for a fourth end of an answer: it does not stop at {shown}"] if left else []


def sampling(generation: Mapping[str, Any]) -> dict[str, Value]:
    """How generation_config.json says that tokens are chosen, under llama.cpp's keys; none where it does not sample."""
    given = {name: generation.get(name) for name in SAMPLING.values()} if generation.get("do_sample", True) else {}
    return {
        key: int32(int(value)) if name == "top_k" else float32(float(value))
        for key, name in SAMPLING.items()
        if isinstance(value := given.get(name), (int, float))
    }


def _adds_bos(source: Mapping[str, Any], settings: Mapping[str, Any], bos: int | None) -> bool:
    """Whether encoding a text puts BOS before it."""
    processor = source.get("post_processor") or {}
    for step in [processor, *processor.get("processors", [])]:
        if step.get("type") == "TemplateProcessing":
            first = (step.get("single") or [{}])[0].get("SpecialToken", {}).get("id")
            return bos in (step.get("special_tokens") or {}).get(first, {}).get("ids", [])
    return bool(settings.get("add_bos_token", True))


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> dict[str, Value]:
    """The chat template, and named ones beside it."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {Keys.Tokenizer.CHAT_TEMPLATE: string(read_text(file))}
    template = settings.get("chat_template")
    if isinstance(template, str):
        return {Keys.Tokenizer.CHAT_TEMPLATE: string(template)}
    values: dict[str, Value] = {}
    names = []
    for item in template or []:
        if item.get("name") == "default":
            values[Keys.Tokenizer.CHAT_TEMPLATE] = string(item["template"])
        else:
            names.append(item["name"])
            values[Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=item["name"])] = string(item["template"])
    if names:
        values[Keys.Tokenizer.CHAT_TEMPLATES] = string(names)
    return values


def _foreign(source: Mapping[str, Any]) -> list[str]:
    """Notes on steps before the merges that llama.cpp has no counterpart for."""
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizer, splitter = source.get("normalizer") or {}, source.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer])
    notes = []
    if steps != [replaced]:
        notes.append("the tokenizer's normalizer is not Gemma's: llama.cpp may tokenize differently")
    # Splitting at spaces never happens: the normalizer has replaced them.
    if splitter and not (splitter.get("type") == "Split" and splitter.get("pattern") == {"String": " "}):
        notes.append("the tokenizer splits a text before merging, Gemma's does not: llama.cpp may tokenize differently")
    return notes


def _content(token: Any) -> str | None:
    """The text of a special token in tokenizer_config.json: a string, or an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _some(items: Iterable[str], limit: int = 5) -> str:
    items = list(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
