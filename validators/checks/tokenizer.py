"""The artefact's tokenizer against the checkpoint's: the same ids for the same texts, or it is another model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from gemexport.formats.storage.errors import InputError


@dataclass(frozen=True)
class Difference:
    """A text that the artefact tokenizes differently."""

    text: str
    expected: tuple[int, ...]
    found: tuple[int, ...]


@dataclass(frozen=True)
class TokenizerComparison:
    """How many texts were compared, and those that differ."""

    texts: int
    differences: tuple[Difference, ...]

    @property
    def equal(self) -> int:
        """Texts with the same token ids."""
        return self.texts - len(self.differences)


def read(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json; InputError for a file that Hugging Face's tokenizers do not take.

    Files of the same bytes are one tokenizer, which nobody here changes: to build Gemma's takes a second.
    """
    try:
        return _built(path.read_bytes())
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).splitlines()[0]
        raise InputError(path, f"is not read by tokenizers ({reason})", "save the tokenizer again") from error


@lru_cache(maxsize=2)  # a checkpoint's and an artefact's
def _built(content: bytes) -> Tokenizer:
    return Tokenizer.from_buffer(content)


def load(path: Path) -> Callable[[str], list[int]]:
    """A function from a text to token ids, special tokens parsed and no BOS added, of a tokenizer.json."""
    tokenizer = read(path)
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def compare(
    expected: Callable[[str], Sequence[int]], found: Callable[[str], Sequence[int]], texts: Sequence[str]
) -> TokenizerComparison:
    """Tokenize every text both ways."""
    differences = []
    for text in texts:
        ours, theirs = tuple(expected(text)), tuple(found(text))
        if ours != theirs:
            differences.append(Difference(text, ours, theirs))
    return TokenizerComparison(len(texts), tuple(differences))
