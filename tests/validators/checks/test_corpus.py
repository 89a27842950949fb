"""The texts for tokenizers: the same every time, and with everything that they promise."""

from __future__ import annotations

import unicodedata

import pytest

from gemexport.validators.checks.corpus import corpus, script, scripts

PIECES = ["▁the", "ing", "▁", "é", "日本", "\n\n", "<0x0A>", "", "▁▁"]
ADDED = ["<bos>", "<start_of_turn>", *(f"<unused{i}>" for i in range(50))]


@pytest.fixture(scope="module")
def texts() -> tuple[str, ...]:
    return corpus(PIECES, ADDED)


def test_the_same_vocabulary_gives_the_same_texts(texts: tuple[str, ...]) -> None:
    assert corpus(PIECES, ADDED) == texts
    assert corpus(PIECES[:3], ADDED) != texts
    assert len(texts) == len(set(texts)) > 4000


def test_every_script_of_unicode_is_there(texts: tuple[str, ...]) -> None:
    """The names are those of Unicode's own characters; the known ones must be among them."""
    seen = set("".join(texts))
    assert all(seen & set(letters) for letters in scripts().values())
    wanted = "LATIN GREEK CYRILLIC ARABIC HEBREW DEVANAGARI TAMIL THAI TIBETAN ETHIOPIC CHEROKEE HANGUL HIRAGANA ADLAM"
    assert set(wanted.split()) <= scripts().keys()
    assert {"OLD ITALIC", "LINEAR B", "TAI THAM", "CJK UNIFIED", "MEETEI MAYEK"} <= scripts().keys()
    assert script("ѣ") == "CYRILLIC"


def test_every_page_of_unicode_is_there(texts: tuple[str, ...]) -> None:
    seen = {ord(character) >> 8 for character in "".join(texts)}
    named = {code >> 8 for code in range(0x40000) if unicodedata.name(chr(code), "")}
    assert named <= seen


@pytest.mark.parametrize(
    "part",
    ["\u2028", "\r\n\r\n", "\t" * 33, "a" * 1000, "👩\u200d👩\u200d👧\u200d👦", "🏴\U000e0067\U000e0062",
     "1\ufe0f\u20e3", "\x00", "\u202e", "\ufffe", "<start_of_turn>", "in<bos>side", "<BOS>", "\u0301",
     "Café déjà vu — 123 😊"],
)  # fmt: skip
def test_hard_cases_are_there(texts: tuple[str, ...], part: str) -> None:
    assert any(part in text for text in texts)


def test_texts_can_be_encoded(texts: tuple[str, ...]) -> None:
    """A lone surrogate is no text; a runtime takes UTF-8."""
    assert all(text.encode("utf-8") for text in texts if text)


def test_a_tokenizer_without_added_tokens_has_texts_too() -> None:
    assert len(corpus([], [])) > 3000
