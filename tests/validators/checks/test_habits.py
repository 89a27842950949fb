"""What a program does around the decoder is compared with the checkpoint, and what it leaves to its caller is noted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from gemexport.formats.checkpoint import Checkpoint
from gemexport.validators.checks.habits import Habits, decoded, differences, notes, of_file

SAID = Habits((2,), frozenset({1, 106}), 0, lambda ids: " ".join(map(str, ids)))


def shown(token: int) -> str:
    return f"<{token}>"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stops": frozenset({1})}, "it does not end an answer at <106>"),
        ({"stops": frozenset()}, "it does not end an answer at <1>, <106>"),
        ({"begins": ()}, "it puts nothing before a text, the checkpoint <2>"),
        ({"begins": (2, 2)}, "it puts <2>, <2> before a text, the checkpoint <2>"),
    ],
)
def test_what_a_program_does_otherwise_is_named(change: dict[str, object], told: str) -> None:
    assert list(differences("it", SAID, SAID, shown)) == []
    assert list(differences("it", SAID, replace(SAID, **change), shown)) == [told]


def test_what_it_leaves_to_others_is_no_difference() -> None:
    assert list(differences("it", SAID, Habits(), shown)) == []
    assert decoded("it", SAID, Habits(), [[1, 2]]) is None
    more = replace(SAID, stops=frozenset({1, 106, 7}))
    assert list(differences("it", SAID, more, shown)) == [], "it ends answers at more tokens"


def test_texts_that_read_otherwise_are_shown_from_where_they_do() -> None:
    other = replace(SAID, decode=lambda ids: "  ".join(map(str, ids)))
    assert decoded("it", SAID, SAID, [[1, 2]]) is None
    assert decoded("it", SAID, other, [[7], [1, 2]]) == (
        "1 of 2 texts are decoded otherwise by it: '1  2' where the checkpoint has '1 2'"
    )


def test_what_its_caller_has_to_do_is_noted() -> None:
    leaves = replace(SAID, begins=(), told="tell it", likeliest="say --temp")
    assert list(differences("it", SAID, leaves, shown)) == []
    assert list(notes("it", SAID, leaves, shown, {"top_k": 64})) == [
        "it puts no BOS before a text unless it is told to: tell it",
        "it takes the likeliest token unless told to sample, as the checkpoint is (top_k 64): say --temp",
    ]
    assert list(notes("it", SAID, leaves, shown, {})) == ["it puts no BOS before a text unless it is told to: tell it"]


def test_another_padding_is_noted() -> None:
    (told,) = notes("it", SAID, replace(SAID, pad=3), shown, {})
    assert told.startswith("it fills shorter texts up with <3>, the checkpoint with <0>: ")


def test_a_tokenizer_file_says_what_programs_do_that_take_it(gemma4: Checkpoint) -> None:
    found = of_file(gemma4.assets / "tokenizer.json")
    assert (found.begins, found.stops, found.pad) == ((2,), None, None)
    assert found.decode is not None
    encode = Tokenizer.from_file(str(gemma4.assets / "tokenizer.json")).encode
    assert found.decode(encode("Two words.", add_special_tokens=False).ids) == "Two words."


def test_llama_cpp_says_what_it_does(gemma4: Checkpoint, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gemexport.exporters.gguf")
    llama = pytest.importorskip("gemexport.validators.runtimes.llama_cpp")
    path = gguf.export(gemma4, tmp_path / "model.gguf").path
    runtime = llama.load(path, threads=1, context=16)
    found, text = runtime.habits(), "Of p_1, ..., p_n: <turn|> 🙂"
    assert found.begins == (2,)
    assert found.stops is not None
    assert set(gemma4.architecture.eos_token_ids) <= found.stops
    assert found.decode(runtime.tokenize(text)) == text
    runtime.close()
