"""The built-in texts and the sequences made of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from gemexport.demo import SIZES, config_json
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.gemma.model import architecture
from gemexport.validators.checks import prompts as built_in
from gemexport.validators.checks.prompts import (
    HARD_TEXTS,
    KINDS,
    MIXED,
    calibration,
    passages,
    prompts,
    sequences,
    texts,
)


def test_there_are_texts_in_many_scripts() -> None:
    text = "".join(prompts())
    assert len(prompts()) == len(set(prompts())) >= 20
    for sample in ("猫", "道", "인간", "الناس", "मनुष्यों", "άνθρωποι", "семьи", "😅", "SELECT", "def "):
        assert sample in text
    assert len(HARD_TEXTS) == len(set(HARD_TEXTS))


def test_no_text_is_both_calibrated_and_judged_on() -> None:
    judged, calibrated = (runs(text) for text in (prompts(), map(words, calibration())))
    assert len(calibrated) > 5000
    assert not judged & calibrated


def words(text: str | tuple[tuple[str, str], ...]) -> str:
    return text if isinstance(text, str) else "\n".join(said for _, said in text)


def runs(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """Every eight words that follow each other; of scripts without spaces, a word is a letter."""
    found = set()
    for text in texts:
        parts = re.findall(r"[\u0e00-\u0e7f\u3040-\u9fff\uac00-\ud7af]|[^\W_]+", text.lower())
        found |= {tuple(parts[i : i + 8]) for i in range(len(parts) - 7)}
    return found


def test_calibration_texts_are_of_many_scripts_and_kinds() -> None:
    texts = calibration()
    turns = [text for text in texts if not isinstance(text, str)]
    assert len(turns) >= 6
    assert all([role for role, _ in text] == ["user", "assistant"] * (len(text) // 2) for text in turns)
    text = "".join(map(words, texts))
    for sample in (
        "時計",
        "老",
        "도서관",
        "السوق",
        "गाँव",
        "νησί",
        "осенью",
        "ספרייה",
        "ตลาด",
        "fn ",
        "SELECT",
        "#include",
        "package main",
        "| quarter |",
        "@example.com",
    ):
        assert sample in text
    assert not any(mark in text for mark in ("@user", "@model", "%%"))


@pytest.mark.parametrize("tokens", [2, 100, 700, 5000])
def test_sequences_have_as_many_tokens_as_asked_for_and_begin_with_bos(tiny_gemma4: Path, tokens: int) -> None:
    decoder = open_checkpoint(tiny_gemma4).architecture
    found = sequences([[7, 8, 9], [10, 11, 10**9]], decoder, tokens)
    assert sum(map(len, found)) == tokens
    assert all(sequence[0] == decoder.bos_token_id for sequence in found)
    assert all(token < decoder.vocab_size for sequence in found for token in sequence)


def test_sequences_leave_the_sliding_window(tiny_gemma4: Path) -> None:
    decoder = open_checkpoint(tiny_gemma4).architecture.model_copy(update={"sliding_window": 512})
    assert len(sequences([list(range(10, 400))], decoder, 2048)[0]) > 512


@pytest.mark.parametrize(
    ("tokens", "window"), [(416, 512), (512, 8), (512, 512), (2048, 512), (2048, 1024), (9000, 4096)]
)
def test_every_kind_of_text_has_a_hundred_tokens_and_the_document_leaves_the_window(
    tiny_gemma4: Path, tokens: int, window: int
) -> None:
    decoder = open_checkpoint(tiny_gemma4).architecture.model_copy(update={"sliding_window": window})
    ids = {text: [10 + i % 200 for i in range(len(text) // 4)] for text in prompts()}
    found = passages(ids, decoder, tokens)
    counts = {kind: sum(len(item.tokens) for item in found if item.kind == kind) for kind in KINDS}
    assert sum(counts.values()) == sum(len(item.tokens) for item in found) == tokens
    assert min(counts.values()) > 100
    assert all(item.tokens[0] == decoder.bos_token_id for item in found)
    assert found[0].kind == "document"
    if tokens == 2048:
        assert len(found[0].tokens) > window


def test_too_few_tokens_for_a_verdict_by_kind_are_of_one(tiny_gemma4: Path) -> None:
    decoder = open_checkpoint(tiny_gemma4).architecture
    ids = {text: [7] * len(text) for text in prompts()}
    found = passages(ids, decoder, 415)
    assert {item.kind for item in found} == {MIXED}
    assert sum(len(item.tokens) for item in found) == 415


def test_a_hundred_tokens_of_other_scripts_are_of_several() -> None:
    start = "".join(texts("scripts")[:4])
    assert all(sample in start for sample in ("дождь", "图书馆", "القطار", "बारिश"))
    assert sorted(prompts()) == sorted(text for kind in KINDS for text in texts(kind))


def test_texts_by_themselves_are_many_and_one_is_long() -> None:
    decoder = architecture(config_json("embeddinggemma", SIZES["tiny"]), "config.json")
    ids = {text: list(range(3, 200)) for kind in built_in.KINDS for text in built_in.texts(kind)}
    for tokens in (256, 512, 2048):
        found = built_in.whole_texts(ids, decoder, tokens)
        assert len(found) > 7
        assert {passage.kind for passage in found} == set(built_in.KINDS)
        assert sum(len(passage.tokens) for passage in found) <= tokens
        assert len(found[0].tokens) > decoder.sliding_window
        assert all((passage.tokens[0], passage.tokens[-1]) == (2, 1) for passage in found)
