"""Patterns of strangers match as Python's own do, or are refused in bounded time and memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.patterns import Pattern

NAME = "model.layers.11.self_attn.q_proj"


@pytest.mark.parametrize(
    "text",
    [
        r".*q_proj",
        r"(?:.*\.)?(q_proj)$",
        r"model\.layers\.(\d|1\d)\..*",
        r"lm_head",
        r"(?P<a>mo)(?P<b>del)",
        r"layers{2}",
    ],
)
def test_as_python_matches(text: str) -> None:
    pattern = Pattern(text, Path("config.json"), "targets", "mend it")
    assert bool(pattern.match(NAME)) == bool(re.match(text, NAME))
    assert bool(pattern.search(NAME)) == bool(re.search(text, NAME))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("(", r"is no regular expression"),
        ("a" * 100_000, "is too large"),
        ("((a{1000}){1000}){1000}", "is too large"),
        ("a{99999999999999999999}", "is too large"),
        ("(" * 2000 + ")" * 2000, "is no regular expression"),
    ],
)
def test_what_cannot_be_compiled(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=f"config.json: targets has the pattern .*{problem}"):
        Pattern(text, Path("config.json"), "targets", "mend it")


@pytest.mark.parametrize("text", [r"(?R)", r"(\w|\w\w|.)+(?<==)$"])
def test_a_pattern_that_would_take_for_ever(text: str) -> None:
    pattern = Pattern(text, Path("config.json"), "targets", "mend it")
    with pytest.raises(InputError, match=r"takes more than 0\.5 s to match"):
        pattern.match(NAME * 20)
