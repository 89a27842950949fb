"""The built-in texts: prompts in several languages and code for the logits, and hard cases for tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from gemexport.formats.gemma.architecture import Architecture

SEPARATOR = "\n%%\n"

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


@cache
def prompts() -> tuple[str, ...]:
    """The built-in texts, some twenty-five, a few hundred characters each."""
    text = files("gemexport.validators.checks").joinpath("texts/prompts.txt").read_text("utf-8")
    return tuple(text.rstrip("\n").split(SEPARATOR))


def sequence_length(architecture: Architecture, tokens: int) -> int:
    """How long a sequence must be to leave the sliding window behind, where `tokens` allow it."""
    wanted = architecture.sliding_window + 64
    return min(tokens, max(256, wanted) if wanted <= 2048 else 256)


def sequences(texts: Sequence[Sequence[int]], architecture: Architecture, tokens: int) -> list[list[int]]:
    """Token sequences of `tokens` tokens in all, made of the token ids of `texts` in turn, each beginning with BOS.

    The texts repeat when they are too few; the last sequence may be shorter.
    """
    start = [architecture.bos_token_id] if architecture.bos_token_id is not None else []
    length = sequence_length(architecture, tokens)
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
