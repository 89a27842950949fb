"""The built-in texts: of several kinds for the logits, and hard cases for tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import zip_longest

from gemexport.formats.gemma.architecture import Architecture

SEPARATOR = "\n%%\n"
# What compression harms first is not what it harms most: code, long documents, scripts other than Latin.
DOCUMENT, SHORT = "document", ("prose", "code", "scripts")
KINDS = (DOCUMENT, *SHORT)
MIXED = "mixed"
SHORTEST = 16  # tokens of a text that is compared by itself, but for BOS and EOS
LEAST = 104  # tokens of each kind: a hundred of text, and BOS

HARD_TEXTS: tuple[str, ...] = (
    "Café déjà vu — 123 😊",
    "Hello, world!",
    " leading space",
    "trailing space ",
    "two  spaces   three    four",
    "tabs\tand\t\ttabs",
    "line\nbreaks\n\nand\r\nmore\n\n\n",
    "\n",
    " ",
    "    indented = code(1)",
    "CamelCaseIdentifiers and snake_case_ones and SHOUTING_CONSTANTS",
    "3.14159 1,000,000 0xDEADBEEF 1e-10 ½ ² ³",
    "don't can't we'll I'd they're it's",
    "https://example.org/path?query=1&other=%20#fragment",
    "e\u0301 versus \u00e9, A\u030a versus \u00c5",
    "👩‍👩‍👧‍👦 👍🏽 🇪🇺 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f ❤️",
    "日本語のテキスト、句読点。「引用」",
    "简体中文和繁體中文",
    "한국어 텍스트 ㅋㅋㅋ",
    "Русский текст с ёлкой",
    "نص عربي مع تشكيلٍ",
    "עברית עם נִקּוּד",
    "हिन्दी में पाठ क्ष त्र ज्ञ",
    "ภาษาไทยไม่มีช่องว่าง",
    "Tiếng Việt có dấu",
    "ქართული ენა Հայերեն አማርኛ",
    "ᚠᛇᚻ 𐍈 𝔉𝔯𝔞𝔨𝔱𝔲𝔯 𝟘𝟙𝟚",
    "zero\u200bwidth \u00a0nbsp \u2009thin \ufeffbom",
    "control \x01\x02\x1b[0m characters",
    "a" * 100,
    "=" * 40 + "-" * 40,
    "<b>html</b> & &amp; <!-- comment -->",
    "▁ is the space of SentencePiece",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<bos><eos><pad><unk>",
    "def f(x):\n    return x ** 2  # squared\n",
)


CALIBRATION = "calibration"  # the file of texts that nothing is judged on
ROLES = {"@user": "user", "@model": "assistant"}


@cache
def calibration() -> tuple[str | tuple[tuple[str, str], ...], ...]:
    """Texts to round weights on, none of which is judged on: plain ones, and conversations as (role, words) by turn.

    Ten scripts and more, prose, code in a dozen languages, tables, numbers, letters.
    """
    return tuple(_turns(text) or text for text in texts(CALIBRATION))


def _turns(text: str) -> tuple[tuple[str, str], ...]:
    """The turns of a conversation, each begun by a line that says whose it is; none in another text."""
    turns: list[tuple[str, list[str]]] = []
    for line in text.split("\n") if text.partition("\n")[0] in ROLES else []:
        if line in ROLES:
            turns.append((ROLES[line], []))
        else:
            turns[-1][1].append(line)
    return tuple((role, "\n".join(words)) for role, words in turns)


@cache
def texts(kind: str) -> tuple[str, ...]:
    """The built-in texts of one of KINDS, or CALIBRATION, in the order in which they are read."""
    text = files("gemexport.validators.checks").joinpath(f"texts/{kind}.txt").read_text("utf-8")
    return tuple(text.rstrip("\n").split(SEPARATOR))


@cache
def prompts() -> tuple[str, ...]:
    """All built-in texts, some fifty, most of a few hundred characters: one of each kind in turn, documents last."""
    kinds = [texts(kind) for kind in (*SHORT, DOCUMENT)]
    return tuple(text for row in zip_longest(*kinds[:-1]) for text in row if text is not None) + kinds[-1]


def sequence_length(architecture: Architecture, tokens: int) -> int:
    """How long a sequence must be to leave the sliding window behind, where `tokens` allow it."""
    wanted = architecture.sliding_window + 64
    return min(tokens, max(256, wanted) if wanted <= 2048 else 256)


@dataclass(frozen=True)
class Passage:
    """A sequence of token ids that logits are judged on, and its kind: one of KINDS, or MIXED."""

    kind: str
    tokens: list[int]


def passages(encoded: Mapping[str, Sequence[int]], architecture: Architecture, tokens: int) -> list[Passage]:
    """`tokens` tokens of the built-in texts in all, given the ids of each text, by kind: the document first.

    A hundred of each kind at least; below that all texts are of one kind, MIXED.
    """
    if tokens < len(KINDS) * LEAST:
        return [Passage(MIXED, found) for found in sequences([encoded[t] for t in prompts()], architecture, tokens)]
    # The document is long enough to leave the sliding window behind, where that leaves the others their share.
    long = min(max(tokens // len(KINDS), sequence_length(architecture, tokens)), tokens - len(SHORT) * LEAST)
    each, over = divmod(tokens - long, len(SHORT))
    counts = {DOCUMENT: long + over, **dict.fromkeys(SHORT, each)}
    longest = sequence_length(architecture, tokens)
    return [
        Passage(kind, found)
        for kind, count in counts.items()
        for found in sequences([encoded[text] for text in texts(kind)], architecture, count, longest)
    ]


def whole_texts(encoded: Mapping[str, Sequence[int]], architecture: Architecture, tokens: int) -> list[Passage]:
    """Built-in texts, each by itself between BOS and EOS, one of each kind in turn, as far as `tokens` tokens go.

    One is longer than a sliding layer sees, where `tokens` allow it: it comes first, and has no more than half of them.
    The others are cut, so that there are a dozen and more.
    """
    start = [] if architecture.bos_token_id is None else [architecture.bos_token_id]
    end = list(architecture.eos_token_ids[:1])
    stream = [token for text in texts(DOCUMENT) for token in encoded[text] if token < architecture.vocab_size]
    longest = min(tokens // 2, sequence_length(architecture, tokens)) - len(start) - len(end)
    found = [Passage(DOCUMENT, [*start, *stream[:longest], *end])]
    left = tokens - len(found[0].tokens)
    for row in zip_longest(*(texts(kind) for kind in SHORT)):
        for kind, text in zip(SHORT, row, strict=True):
            ids = [token for token in encoded[text] if token < architecture.vocab_size] if text is not None else []
            whole = [*start, *ids[: max(SHORTEST, tokens // 32)], *end]
            if ids and len(whole) <= left:
                found.append(Passage(kind, whole))
                left -= len(whole)
    return found


def sequences(
    texts: Sequence[Sequence[int]], architecture: Architecture, tokens: int, longest: int | None = None
) -> list[list[int]]:
    """Token sequences of `tokens` tokens in all, made of the token ids of `texts` in turn, each beginning with BOS.

    None is longer than `longest`, by default what leaves the sliding window behind.

    The texts repeat when they are too few; the last sequence may be shorter.
    """
    start = [architecture.bos_token_id] if architecture.bos_token_id is not None else []
    length = longest or sequence_length(architecture, tokens)
    stream = [token for text in texts for token in text if token < architecture.vocab_size]
    if not stream:
        raise ValueError("the texts have no tokens")
    result: list[list[int]] = []
    position, left = 0, tokens
    while left > len(start):
        size = min(length, left) - len(start)
        piece = [stream[(position + i) % len(stream)] for i in range(size)]
        result.append(start + piece)
        position, left = position + size, left - size - len(start)
    return result
