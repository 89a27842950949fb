"""Thousands of texts for tokenizers, made on the spot: what `unicodedata` knows of, and the vocabulary's own pieces.

The same vocabulary gives the same texts under one version of Unicode, Python's (`unicodedata.unidata_version`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from random import Random

SPACE = "▁"
NAMED = (range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))  # all others are surrogates, private or free
# The first of these words in a character's name ends the name of its script: OLD ITALIC LETTER A.
_KINDS = frozenset((
    "LETTER", "CAPITAL", "SMALL", "SIGN", "VOWEL", "SYLLABLE", "SYLLABICS", "DIGIT", "NUMBER", "NUMERIC", "MARK",
    "CHARACTER", "IDEOGRAPH", "HIEROGLYPH", "IDEOGRAM", "LIGATURE", "TONE", "SYMBOL", "CONSONANT", "RADICAL",
    "COMPONENT", "FINAL", "INDEPENDENT", "DEPENDENT", "SUBJOINED",
))  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")
_WHITESPACE = (
    " ", "\t", "\n", "\r", "\r\n", "\v", "\f", "\x85", "\xa0", "\u1680", "\u180e",
    *(chr(code) for code in range(0x2000, 0x2010)), "\u2028", "\u2029", "\u202f", "\u205f", "\u2060", "\u3000",
    "\ufeff", SPACE,
)  # fmt: skip
_RUNS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64)
_SKIN = ("", *(chr(code) for code in range(0x1F3FB, 0x1F400)))
_PEOPLE = "👩👨🧑👶👧👦👵🤴👮🕵💂👷🤰🤱🦸🧙🏃🏊🚴🛀👋🤚✋👌👍👎✊👏🙏💪🤝"
_JOINED = "⚕🌾🍳🎓🎤🏫🏭💻💼🔧🔬🎨🚒✈🚀⚖♂♀🦰🦱🦳🦲🦯🦼🦽"
_FAMILIES = ("👩👩👧👦", "👨👩👧", "👨👦👦", "👩❤️👨", "👩❤️💋👩", "🧑🤝🧑", "👁️🗨️", "🏳️🌈", "🏳️⚧️", "🏴☠️", "🐕🦺")
_TAG_FLAGS = ("gbeng", "gbsct", "gbwls", "usca")
_CODE = (
    "def {a}({b}: int = {n}) -> list[{c}]:\n{i}return [{b} ** 2 for {a} in range({n})]  # {c}\n",
    "for (int {a} = {n}; {a} <= {b}->{c}; ++{a}) {{\n{i}{b}[{a}] &= ~0x{n:X}u;\n}}\n",
    '{{"{a}": [{n}, -{n}.5e-{n}, null, true], "{b}": {{"{c}": "\\u00e9\\n"}}}}',
    "SELECT {a}, COUNT(*) FROM {b} WHERE {c} <> '{n}' GROUP BY 1;",
    "<{a} class=\"{b}-{n}\" data-{c}='&amp;'>{i}</{a}><!-- {b} --><br/>",
    "$\\sum_{{{a}={n}}}^{{\\infty}} \\frac{{{b}^{a}}}{{{c}!}} \\neq \\mathbb{{R}}$",
    "fn {a}<'{b}, T: {c}>(x: &'{b} mut T) -> Option<Box<dyn {c}>> {{ x.{a}()?; None }}",
    "https://{a}.example.org:{n}/{b}/%7E{c}?q={a}+{b}&n={n}#{c}",
    "#!/bin/sh\n{i}{a}=$({b} --{c}=\"${{{a}:-{n}}}\" | sed -e 's/{b}/{c}/g' 2>&1)\n",
    "| {a} | {b} |\n|:--|--:|\n| **{c}** | `{n}` |\n\n- [ ] {a}\n{i}1. {b}\n> {c}\n```\n{a}\n```\n",
)
_WORDS = (
    *("value", "x", "camelCaseName", "snake_case_name", "SHOUTING", "i18n", "__init__", "naïve", "Größe", "переменная"),
    *("变量", "المتغير", "don't", "e-mail", "C++", "node_modules", "HTTPServer2"),
)
_SENTENCES = (
    "Café déjà vu — 123 😊",
    "I can't believe it's not 3.14159… it’s “quoted”, isn't it?",
    "Dr. Müller-Lüdenscheidt zahlt 1.299,00 € (inkl. 19 % MwSt.) am 14.7.2025!",
    "Die Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "Tiếng Việt có dấu; Zażółć gęślą jaźń; Příliš žluťoučký kůň",
    "中文字符，没有空格。日本語のテキスト、ｶﾀｶﾅ、한국어 텍스트ㅋㅋㅋ",
    "مرحبا بالعالم، كيف الحالُ؟ שלום עולם, נִקּוּד",
    "मनुष्यों को क्ष त्र ज्ञ श्री, வணக்கம், ไม่มีช่องว่าง, မြန်မာဘာသာ, ភាសាខ្មែរ, བོད་སྐད་",
    "1st 2nd 3rd 0x1F 1e-10 ½ ² ³ ⅷ ① ㊗ № ™ ℃",
    "C:\\Users\\name\\file.txt /usr/local/bin ~/.config user@example.org @name #hashtag",
)


def corpus(pieces: Sequence[str], added: Sequence[str]) -> tuple[str, ...]:
    """Different texts, some six thousand, for a tokenizer with these pieces ("▁" for a space) and added tokens.

    Every script and every 256 code points that Python's Unicode knows of, emoji in sequences, combining marks, runs of
    every whitespace, control characters, the added tokens as text and inside words, digits, code, long words, and
    pieces in random order. None holds a lone surrogate: that is no text.
    """
    made = [
        *_SENTENCES, *_scripts(), *_pages(), *_emoji(), *_combining(), *_whitespace(), *_controls(), *_digits(),
        *_code(), *_long(), *_special(added), *_pieces(pieces, added),
    ]  # fmt: skip
    return tuple(dict.fromkeys(made))


@cache
def scripts() -> dict[str, str]:
    """The letters, marks and numbers of every script that Python's Unicode knows of, by its name.

    What has a name of its own, as GREEK KAI SYMBOL, is with its script.
    """
    found: defaultdict[str, list[str]] = defaultdict(list)
    for character in _assigned():
        if unicodedata.category(character)[0] in "LMN":
            found[script(character)].append(character)
    for name in [name for name in found if len(found[name]) < 4 and " " in name]:
        found[name.split()[0]] += found.pop(name)
    return {name: "".join(sorted(found[name])) for name in sorted(found)}


def script(character: str) -> str:
    """What a character's name begins with, up to the word that says what it is; empty where it has no name."""
    words = unicodedata.name(character, "").replace("-", " ").split()
    end = next((i for i, word in enumerate(words) if word in _KINDS), 1)
    return " ".join(words[: max(end, 1)])


@cache
def _assigned() -> str:
    """Every character that has a name."""
    return "".join(chr(code) for part in NAMED for code in part if unicodedata.name(chr(code), ""))


def _words(stream: Random, letters: Sequence[str], count: int) -> str:
    return " ".join("".join(stream.choices(letters, k=stream.randint(1, 8))) for _ in range(count))


def _scripts() -> Iterator[str]:
    """Of each script a row of letters and two lines of words, and its marks and digits among ASCII."""
    for name, letters in scripts().items():
        stream = Random(name)
        yield "".join(stream.sample(letters, min(len(letters), 24)))
        yield _words(stream, letters, 6)
        yield f"The {name.title()} word “{_words(stream, letters, 1)}”, {_words(stream, letters, 2)}."
        marks = [letter for letter in letters if unicodedata.category(letter)[0] == "M"]
        if marks:
            yield "".join(letter + stream.choice(marks) for letter in stream.choices(letters, k=8))


def _pages() -> Iterator[str]:
    """Twelve characters of each 256 code points that has any, and what no character is: private, unassigned, last."""
    pages: defaultdict[int, list[str]] = defaultdict(list)
    for character in _assigned():
        pages[ord(character) >> 8].append(character)
    for page, characters in pages.items():
        stream = Random(page)
        yield "".join(stream.sample(characters, min(len(characters), 12)))
    for code in (0x378, 0xE000, 0xF8FF, 0xFDD0, 0xFFFE, 0xFFFF, 0x1FFFF, 0x2FFFF, 0xF0000, 0x10FFFF):
        yield f"a{chr(code)}b {chr(code) * 3}"


def _emoji() -> Iterator[str]:
    """Skin tones, sequences joined by ZWJ, flags, keycaps, both variation selectors, halves of all that."""
    zwj, text, picture = "\u200d", "\ufe0e", "\ufe0f"
    for person, skin in product(_PEOPLE, _SKIN):
        yield person + skin
    stream = Random("emoji")
    for role in _JOINED:
        yield f"{stream.choice('👩👨🧑')}{stream.choice(_SKIN)}{zwj}{role}{picture} {role}{text}{role}"
    for family in _FAMILIES:
        parts = [part for part in family if part != picture]
        yield zwj.join(parts)
        yield zwj.join(parts[:-1]) + zwj
        yield "!" + zwj.join(part + picture for part in parts) + "ok"
    letters = [chr(code) for code in range(0x1F1E6, 0x1F200)]
    for _ in range(120):
        yield "".join(stream.choices(letters, k=stream.randint(1, 6)))
    for region in _TAG_FLAGS:
        yield "🏴" + "".join(chr(0xE0000 + ord(letter)) for letter in region) + "\U000e007f"
    for key in "0123456789#*":
        yield f"{key}{picture}\u20e3{key}\u20e3"
    pictures = [chr(code) for start, stop in ((0x1F300, 0x1F650), (0x1F680, 0x1F6F0)) for code in range(start, stop)]
    for _ in range(120):
        yield stream.choice(("", "so ", "x")).join(stream.choices(pictures, k=stream.randint(1, 6)))


def _combining() -> Iterator[str]:
    """Marks stacked on letters, letters in all four normal forms, Hangul in parts."""
    stream = Random("combining")
    marks = [chr(code) for code in (*range(0x300, 0x370), *range(0x1AB0, 0x1ABF), *range(0x20D0, 0x20F1))]
    letters = "aeiouyAcnszLġИیक한Ω ."
    for _ in range(200):
        yield "".join(letter + "".join(stream.choices(marks, k=stream.randint(0, 4))) for letter in letters[:6])
        letters = letters[1:] + letters[0]
    yield "Z" + "".join(stream.choices(marks, k=40)) + "algo"
    composed = [c for c in _assigned() if unicodedata.decomposition(c)]
    for _ in range(60):
        text = "".join(stream.sample(composed, 10))
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            yield unicodedata.normalize(form, text)


def _whitespace() -> Iterator[str]:
    """Runs of each whitespace alone, between words and before a line's first word, and mixtures."""
    for white, length in product(_WHITESPACE, _RUNS):
        run = white * length
        yield run
        yield f"word{run}word\n{run}first"
    stream = Random("whitespace")
    for _ in range(250):
        run = "".join(stream.choice(_WHITESPACE) * stream.choice(_RUNS[:6]) for _ in range(stream.randint(2, 5)))
        yield stream.choice(("", "a", "1", ".")) + run + stream.choice(("", "b", "2", "。"))


def _controls() -> Iterator[str]:
    """Each control and format character alone, in a word, and in a row."""
    formats = [c for c in _assigned() if unicodedata.category(c) == "Cf"]
    for character in (*map(chr, (*range(32), *range(127, 160))), *formats):
        yield character
        yield f"in{character}side {character * 3}"


def _digits() -> Iterator[str]:
    stream = Random("digits")
    for length in range(1, 33):
        yield "".join(stream.choices("0123456789", k=length))
        yield f"{stream.randrange(10**length):,}.{stream.randrange(10**4):04} and -{stream.randrange(10**length):x}"
    digits = [c for c in _assigned() if unicodedata.category(c) == "Nd"]
    for start in range(0, len(digits), 10):
        yield "".join(digits[start : start + 10])


def _code() -> Iterator[str]:
    stream = Random("code")
    for _ in range(25):
        for line in _CODE:
            names = dict(zip("abc", stream.sample(_WORDS, 3), strict=True))
            indent = stream.choice((" ", "\t")) * stream.randint(1, 16)
            yield line.format(n=stream.randrange(10**5), i=indent, **names)


def _long() -> Iterator[str]:
    """Words without a break, of one character and of many; a merge that looks too far ahead fails here."""
    stream = Random("long")
    for character, length in product("aA0=-_.*#ßж中ी😀é", (10, 63, 64, 65, 255, 1000)):
        yield character * length
    for alphabet, length in product(("abcdefghijklmnopqrstuvwxyz", "ACGT", "01", "абвгдежз", "のにはをが"), (100, 400)):
        yield "".join(stream.choices(alphabet, k=length))


def _special(added: Sequence[str]) -> Iterator[str]:
    """Added tokens alone, in words, among spaces, doubled, cut in two and in another case; of many alike, some."""
    alike = [token for token in added if token.startswith("<unused")]
    stream = Random("special")
    own = [token for token in added if not token.startswith("<unused")]
    chosen = [*stream.sample(own, min(len(own), 250)), *stream.sample(alike, min(len(alike), 20))]
    for token in sorted(chosen):
        cut = stream.randint(1, max(1, len(token) - 1))
        yield token
        yield f"in{token}side  {token} {token}{token}\n{token}\n"
        yield f"{token[:cut]} {token[cut:]} {token[:-1]} {token.swapcase()} \\{token}"
    for _ in range(100):
        yield "".join(stream.choices(chosen, k=stream.randint(2, 5))) if chosen else ""
    yield "<0x41><0x0A> are no bytes, <0xGG> nothing"


def _pieces(pieces: Sequence[str], added: Sequence[str]) -> Iterator[str]:
    """Pieces in random order, as they stand, as words, and with added tokens among them."""
    stream = Random("pieces")
    usable = [piece for piece in pieces if piece and not _SURROGATE.search(piece)]
    if not usable:
        return
    for number in range(1000):
        chosen = stream.choices(usable, k=stream.randint(2, 12))
        if added and number % 5 == 0:
            chosen.insert(stream.randrange(len(chosen)), stream.choice(added))
        yield ("" if number % 2 else " ").join(chosen).replace(SPACE, " " if number % 3 else SPACE)
