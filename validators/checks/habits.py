"""What a program does around the decoder: what it puts before a text, where it stops, how it pads, what ids read as.

Files say it too, and `vocabulary` compares these; a program may make something else of them, and is asked itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemexport.validators.checks.tokenizer import read

Ids = Sequence[int]
BEFORE, TEXT = 8, 40  # characters of a text that are shown: of those before it differs, and in all


@dataclass(frozen=True)
class Habits:
    """What a program does with an artefact; None for what it leaves to whoever calls it."""

    begins: tuple[int, ...] | None = None  # ids before a text, as a client calls the tokenizer
    stops: frozenset[int] | None = None  # at which it ends an answer
    pad: int | None = None  # with which it fills shorter sequences up
    decode: Callable[[Ids], str] | None = None  # ids as a text
    likeliest: str = ""  # how it is told to sample, where it takes the likeliest token unless it is told
    told: str = ""  # how it is told to put BOS, where it does only then, whatever the artefact says


def differences(name: str, expected: Habits, found: Habits, shown: Callable[[int], str]) -> Iterator[str]:
    """A sentence for each thing that the program `name` does otherwise around a text; `shown` tells a token."""
    if found.stops is not None and expected.stops is not None:
        lost = sorted(expected.stops - found.stops)
        if lost:
            yield f"{name} does not end an answer at {', '.join(map(shown, lost))}"
    if found.begins is not None and expected.begins is not None and found.begins != expected.begins and not found.told:
        ours, theirs = (", ".join(map(shown, ids)) or "nothing" for ids in (expected.begins, found.begins))
        yield f"{name} puts {theirs} before a text, the checkpoint {ours}"


def decoded(name: str, expected: Habits, found: Habits, texts: Sequence[Ids]) -> str | None:
    """A sentence where ids of some `texts` read as others than they do by the checkpoint's tokenizer; else None."""
    if found.decode is None or expected.decode is None:
        return None
    pairs = [(expected.decode(ids), found.decode(ids)) for ids in texts]
    wrong = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
    if not wrong:
        return None
    ours, theirs = wrong[0]
    same = next((i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), 0)
    start = max(0, same - BEFORE)
    many = f"{len(wrong)} of {len(texts)} texts are decoded otherwise by {name}"
    return f"{many}: {theirs[start : start + TEXT]!r} where the checkpoint has {ours[start : start + TEXT]!r}"


def notes(
    name: str, expected: Habits, found: Habits, shown: Callable[[int], str], sampling: Mapping[str, float]
) -> Iterator[str]:
    """A sentence for each thing that the program leaves to its caller and the checkpoint wants, with what to do.

    And for padding, which changes nothing but what stands beside a shorter text: others choose another token for it.
    """
    if found.pad is not None and expected.pad is not None and found.pad != expected.pad:
        does = f"fills shorter texts up with {shown(found.pad)}, the checkpoint with {shown(expected.pad)}"
        yield f"{name} {does}: mask what is filled up, as its batches do"
    if found.told and expected.begins and found.begins != expected.begins:
        yield f"{name} puts no BOS before a text unless it is told to: {found.told}"
    if found.likeliest and sampling:
        wanted = ", ".join(f"{key} {value:g}" for key, value in sampling.items())
        does = "takes the likeliest token unless told to sample"
        yield f"{name} {does}, as the checkpoint is ({wanted}): {found.likeliest}"


def of_file(path: Path) -> Habits:
    """What programs that take a tokenizer.json as it is do with it; where an answer ends is for whoever calls them."""
    tokenizer = read(path)
    return Habits(
        begins=tuple(tokenizer.encode("").ids),
        decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False)),
    )
