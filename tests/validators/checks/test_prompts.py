"""The built-in texts and the sequences made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemexport.formats.checkpoint import open_checkpoint
from gemexport.validators.checks.prompts import HARD_TEXTS, prompts, sequences


def test_there_are_texts_in_many_scripts() -> None:
    text = "".join(prompts())
    assert len(prompts()) == len(set(prompts())) >= 20
    for sample in ("猫", "道", "인간", "الناس", "मनुष्यों", "άνθρωποι", "семьи", "😅", "SELECT", "def "):
        assert sample in text
    assert len(HARD_TEXTS) == len(set(HARD_TEXTS))


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
