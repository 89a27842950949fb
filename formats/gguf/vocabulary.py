"""The tokenizer in a GGUF file's metadata as the files of a Hugging Face checkpoint: tokenizer.json and its company.

Gemma's tokenizer is BPE over the whole text, with "▁" for a space and bytes as fallback. A file either lists the merges
(tokenizer.ggml.model "gemma4"), or gives each token a score ("llama", which is SentencePiece): the merges are then all
pairs of tokens that make up a token, in the order in which SentencePiece would join them.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import Keys, TokenType

from gemexport.formats.assets import NOTES
from gemexport.formats.gguf.container import MENDED
from gemexport.formats.gguf.metadata import Metadata
from gemexport.formats.storage.errors import InputError

SPACE = "▁"
SENTENCEPIECE, MERGES = "llama", "gemma4"  # values of tokenizer.ggml.model
UNSCORED = -1000.0
MAX_TOKEN_BYTES = 256  # Gemma's longest has 48; the search for merges takes the square of it
# As plain integers: a quarter of a million comparisons with members of an enumeration take seconds.
NORMAL, USER_DEFINED, UNUSED = int(TokenType.NORMAL), int(TokenType.USER_DEFINED), int(TokenType.UNUSED)
_MERGED = (NORMAL, USER_DEFINED)
_MARKER = re.compile(r"<\|?[^\s<>'\"{}%|]{2,40}\|?>")
_ADDED = (int(TokenType.CONTROL), USER_DEFINED, int(TokenType.UNKNOWN))
# Markup of Gemma 4's answers that llama.cpp's chat parser must see; control tokens would be left out of the text.
VISIBLE = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)
# generation_config.json's names for the metadata's.
SAMPLING = {
    Keys.General.SAMPLING_TOP_K: "top_k",
    Keys.General.SAMPLING_TOP_P: "top_p",
    Keys.General.SAMPLING_MIN_P: "min_p",
    Keys.General.SAMPLING_TEMP: "temperature",
    Keys.General.SAMPLING_PENALTY_REPEAT: "repetition_penalty",
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id as tokenizer.json has them; an empty text stands for an id without a token."""

    texts: list[str]
    kinds: list[int]

    def special(self, index: int | None) -> str | None:
        """The text of a token by its id, None when there is none."""
        return self.texts[index] or None if index is not None else None


def check(facts: Metadata, size: int) -> None:
    """Raise InputError where the tokenizer cannot be one of a model of `size` tokens; looks at no token."""
    model = facts.text(Keys.Tokenizer.MODEL)
    if model not in (SENTENCEPIECE, MERGES):
        problem = f"its tokenizer ({model}) is not one of Gemma's"
        raise InputError(facts.path, problem, f"use a file whose tokenizer is {SENTENCEPIECE} or {MERGES}")
    if len(facts.texts(Keys.Tokenizer.LIST)) != size:
        raise facts.wrong(Keys.Tokenizer.LIST, f"{size} tokens, the rows of the embedding")
    facts.array(Keys.Tokenizer.TOKEN_TYPE, size, "iu", "token types")
    if model == SENTENCEPIECE:
        facts.array(Keys.Tokenizer.SCORES, size, "fiu", "scores")
    else:
        facts.texts(Keys.Tokenizer.MERGES)


def write(facts: Metadata, config: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and the chat template into `folder`.

    `config` is that of `gguf_config`. Raises InputError for a vocabulary or merges that are not a tokenizer's.
    """
    size = config["vocab_size"]
    template, others = _templates(facts)
    tokens, broken = repaired(vocabulary(facts, size), [text for text in (template, *others.values()) if text])
    if broken:
        shown = ", ".join(broken[:4])
        note = f"{len(broken)} tokens of the chat template are ordinary text in the file, and are special here: {shown}"
        (folder / NOTES).write_text(json.dumps([note]) + "\n", "ascii")
    _dump(folder / "tokenizer.json", _tokenizer(facts, tokens, config))
    settings = _settings(facts, tokens, config)
    if others:
        named = {"default": template, **others} if template is not None else others
        settings["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    elif template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    _dump(folder / "tokenizer_config.json", settings)
    _dump(folder / "generation_config.json", _generation(facts, config))


def _dump(path: Path, content: Mapping[str, Any]) -> None:
    # In one piece: what json.dump writes bit by bit takes ten times as long.
    path.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def vocabulary(facts: Metadata, size: int) -> Vocabulary:
    """The tokens, with what llama.cpp's files spell differently put back."""
    kinds = facts.array(Keys.Tokenizer.TOKEN_TYPE, size, "iu", "token types")
    sentencepiece = facts.text(Keys.Tokenizer.MODEL) == SENTENCEPIECE
    texts, known = [], set()
    for index, text in enumerate(facts.texts(Keys.Tokenizer.LIST)):
        if 4 * len(text) > MAX_TOKEN_BYTES < len(text.encode()):
            raise InputError(facts.path, f"token {index} has more than {MAX_TOKEN_BYTES} bytes", MENDED)
        if sentencepiece and kinds[index] == USER_DEFINED and len(text) > 1 and not text.strip(" "):
            text = SPACE * len(text)
        if kinds[index] == UNUSED and text == f"[PAD{index}]":
            text = ""  # written where a tokenizer names no token
        if text in known:
            text = ""  # of two tokens with one text only the first can ever be made
        known.add(text)
        texts.append(text)
        if sentencepiece and kinds[index] == NORMAL and len(text) > 1 and not text.strip(SPACE):
            kinds[index] = USER_DEFINED  # SentencePiece models have runs of spaces as symbols
    return Vocabulary(texts, kinds)


def repaired(tokens: Vocabulary, templates: Sequence[str]) -> tuple[Vocabulary, list[str]]:
    """The tokens, those special that a chat template writes and that no text can become, and which these are.

    Converters have left markers of turns as ordinary tokens: no two tokens make them up, so a conversation would be
    spelt out in pieces that the model has never seen.
    """
    places = {text: index for index, text in enumerate(tokens.texts) if text}
    markers = dict.fromkeys(found for text in templates for found in _MARKER.findall(text))
    broken = [
        text
        for text in markers
        if tokens.kinds[places.get(text, -1)] == NORMAL
        and text in places
        and not any(text[:cut] in places and text[cut:] in places for cut in range(1, len(text)))
    ]
    kinds = list(tokens.kinds)
    for text in broken:
        kinds[places[text]] = int(TokenType.CONTROL)
    return Vocabulary(tokens.texts, kinds), broken


def check_twice(facts: Metadata) -> None:
    """Raise InputError for tokens with one text: llama.cpp ends the process at these when it loads the file."""
    seen: dict[str, int] = {}
    twice = [
        (text, seen[text], i)
        for i, text in enumerate(facts.texts(Keys.Tokenizer.LIST))
        if seen.setdefault(text, i) != i
    ]
    if twice:
        text, first, second = twice[0]
        more = f", and {len(twice) - 1} more" if len(twice) > 1 else ""
        problem = f"has the token {text!r} twice, as {first} and {second}{more}: llama.cpp does not load it"
        raise InputError(facts.path, problem, MENDED)


def _tokenizer(facts: Metadata, vocabulary: Vocabulary, config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json, laid out as Gemma's."""
    size = config["vocab_size"]
    if facts.text(Keys.Tokenizer.MODEL) == SENTENCEPIECE:
        scores = facts.array(Keys.Tokenizer.SCORES, size, "fiu", "scores")
        merges = sentencepiece_merges(vocabulary, scores)
        prefixed = facts.flag(Keys.Tokenizer.ADD_PREFIX, True)
    else:
        merges = _listed_merges(facts, vocabulary)
        prefixed = facts.flag(Keys.Tokenizer.ADD_PREFIX, False)
    unknown = facts.index(Keys.Tokenizer.UNK_ID, size)
    if unknown is None and TokenType.UNKNOWN in vocabulary.kinds:
        unknown = vocabulary.kinds.index(TokenType.UNKNOWN)
    space, back = {"String": " "}, {"String": SPACE}
    normalizer: dict[str, Any] = {"type": "Replace", "pattern": space, "content": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": back, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, normalizer]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(vocabulary),
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Split", "pattern": space, "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": _post_processor(facts, vocabulary, size),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": vocabulary.special(unknown),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: index for index, text in enumerate(vocabulary.texts) if text},
            "merges": merges,
        },
    }


def _added(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Tokens that are found in a text before anything is merged."""
    return [
        {
            "id": index, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind != USER_DEFINED,
        }
        for index, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.kinds, strict=True))
        if kind in _ADDED and text
    ]  # fmt: skip


def sentencepiece_merges(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece model, best first: every pair of tokens whose union is a token.

    By the union's score, then the longer first half, then the longer second one, then the union's id: the order in
    which Hugging Face's converter sorts them. Symbols that users define have the score 0 in SentencePiece's own file,
    for which llama.cpp's converter writes UNSCORED.
    """
    texts, kinds = vocabulary.texts, vocabulary.kinds
    known = {text: index for index, text in enumerate(texts) if kinds[index] in _MERGED and text}
    unions, cuts = array("q"), array("q")
    for text, index in known.items():
        for cut in range(1, len(text)):
            if text[:cut] in known and text[cut:] in known:
                unions.append(index)
                cuts.append(cut)
    if not unions:
        return []
    union, first = np.array(unions), np.array(cuts)
    score = np.array(scores, np.float64)
    score[(np.array(kinds) == USER_DEFINED) & (score == UNSCORED)] = 0.0
    second = np.array([len(text) for text in texts])[union] - first
    order = np.lexsort((union, -second, -first, -score[union]))
    return [(texts[unions[i]][: cuts[i]], texts[unions[i]][cuts[i] :]) for i in order]


def _listed_merges(facts: Metadata, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges that a file lists, as pairs; each is of two tokens and makes a third."""
    known = set(vocabulary.texts) - {""}
    merges = []
    for index, merge in enumerate(facts.texts(Keys.Tokenizer.MERGES)):
        first, _, second = merge.partition(" ")
        if first not in known or second not in known or first + second not in known:
            raise InputError(facts.path, f"merge {index} is not of two tokens that make a third", MENDED)
        merges.append((first, second))
    return merges


def _post_processor(facts: Metadata, vocabulary: Vocabulary, size: int) -> dict[str, Any] | None:
    """What is put around a text: BOS before it and perhaps EOS behind it."""
    bos = vocabulary.special(facts.index(Keys.Tokenizer.BOS_ID, size))
    eos = vocabulary.special(facts.index(Keys.Tokenizer.EOS_ID, size))
    before = bos if facts.flag(Keys.Tokenizer.ADD_BOS, True) else None
    after = eos if facts.flag(Keys.Tokenizer.ADD_EOS, False) else None

    def around(sequence: str, kind: int) -> Iterator[dict[str, Any]]:
        if before:
            yield {"SpecialToken": {"id": before, "type_id": kind}}
        yield {"Sequence": {"id": sequence, "type_id": kind}}
        if after:
            yield {"SpecialToken": {"id": after, "type_id": kind}}

    used = [text for text in dict.fromkeys((before, after)) if text]
    if not used:
        return None
    return {
        "type": "TemplateProcessing",
        "single": [*around("A", 0)],
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [vocabulary.texts.index(text)], "tokens": [text]} for text in used
        },
    }


def _settings(facts: Metadata, vocabulary: Vocabulary, config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, but for the chat template."""
    keys = {
        "bos_token": Keys.Tokenizer.BOS_ID,
        "eos_token": Keys.Tokenizer.EOS_ID,
        "mask_token": Keys.Tokenizer.MASK_ID,
        "pad_token": Keys.Tokenizer.PAD_ID,
        "unk_token": Keys.Tokenizer.UNK_ID,
    }
    named = {name: vocabulary.special(facts.index(key, config["vocab_size"])) for name, key in keys.items()}
    return {
        "add_bos_token": facts.flag(Keys.Tokenizer.ADD_BOS, True),
        "add_eos_token": facts.flag(Keys.Tokenizer.ADD_EOS, False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "padding_side": "left",
        "tokenizer_class": "GemmaTokenizer",
        **{name: text for name, text in named.items() if text is not None},
    }


def _templates(facts: Metadata) -> tuple[str | None, dict[str, str]]:
    """The chat template, and others by name."""
    default = facts.text(Keys.Tokenizer.CHAT_TEMPLATE) if facts.has(Keys.Tokenizer.CHAT_TEMPLATE) else None
    if not facts.has(Keys.Tokenizer.CHAT_TEMPLATES):
        return default, {}
    names = facts.texts(Keys.Tokenizer.CHAT_TEMPLATES)
    return default, {name: facts.text(Keys.Tokenizer.CHAT_TEMPLATE_N.replace("{name}", name)) for name in names}


def _generation(facts: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: the special ids, and how to sample where the file says it."""
    ids = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config[key] is not None}
    listed, keys = config["eos_token_id"], (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
    stops = [*listed] if isinstance(listed, list) else [listed]
    stops += [facts.index(key, config["vocab_size"]) for key in keys]  # llama.cpp ends an answer at each of them
    ends = list(dict.fromkeys(stop for stop in stops if stop is not None))
    if ends:
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    sampling = {
        name: facts.count(key, least=0) if name == "top_k" else facts.number(key)
        for key, name in SAMPLING.items()
        if facts.has(key)
    }
    return {**ids, **({"do_sample": True, **sampling} if sampling else {})}
