"""What a runtime adapter gives the logits validator, whichever program is behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gemexport.validators.checks.habits import Habits

# "static-activations" is f32 but for what an artefact's own static scales round; "static-int8" and "static-int16" are
# an NPU's integers throughout.
Arithmetic = Literal[
    "f32", "f16", "bf16", "int8-activations", "int8-activations-256", "static-activations", "static-int8",
    "static-int16",
]  # fmt: skip


@dataclass(frozen=True)
class TopLogits:
    """The k most likely tokens of each position, for runtimes that give no more."""

    ids: NDArray[np.int32]  # [n, k]
    logprobs: NDArray[np.float32]  # [n, k], natural logarithms over the whole vocabulary


Layout = Mapping[str, Any]  # messages, tools, thinking, add_generation_prompt: plain JSON
Logits = NDArray[np.float32] | TopLogits  # [n, vocab], or the top of it


@dataclass
class Laps:
    """What a runtime took for each piece of what it was asked: (tokens, seconds) in order, one token being decoding."""

    laps: list[tuple[int, float]] = field(default_factory=list)

    @contextmanager
    def lap(self, tokens: int) -> Iterator[None]:
        """Time the block, in which the runtime computes `tokens` positions at once, and nothing else happens."""
        started = time.perf_counter()
        yield
        self.laps.append((tokens, time.perf_counter() - started))


class NoEngineError(Exception):
    """The program's engine for templates does not start with the artefact's; the text says why, and what helps."""


class Runtime(Protocol):
    """An artefact loaded by the program that users load it with."""

    @property
    def name(self) -> str:
        """The program and its version."""
        ...

    @property
    def arithmetic(self) -> Arithmetic:
        """What it computes in; decides which bound the conversion is held to."""
        ...

    @property
    def laps(self) -> Laps:
        """What it took for the pieces that it has computed so far."""
        ...

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Teacher-forced logits, one row for each of `tokens`, from an empty cache."""
        ...

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest next tokens, one by one, through the runtime's own KV cache; none where it has none."""
        ...

    def hidden(self, tokens: Sequence[int]) -> list[NDArray[np.float32]] | None:
        """What goes into the first layer and what each layer gives, `[layers + 1][n, hidden]`, as `logits` runs them.

        None where the program does not show it.
        """
        ...

    def tokenize(self, text: str) -> list[int] | None:
        """The artefact's own tokenizer, without BOS and with special tokens parsed; None if it has none of its own."""
        ...

    def habits(self) -> Habits | None:
        """What the program does with the artefact around the decoder; None where it has none of its own."""
        ...

    def chat(self, layouts: Sequence[Layout]) -> list[str] | None:
        """Conversations (validators/chat) as the program lays them out; None if it has no engine for templates.

        Raises NoEngineError where that does not start with the artefact's template, and would with another.
        """
        ...

    def close(self) -> None:
        """Free what was loaded."""
        ...


@runtime_checkable
class Together(Protocol):
    """A runtime that reads its weights anew for whatever it computes, and so takes all sequences through at once."""

    def together(self, sequences: Sequence[Sequence[int]]) -> Iterator[Logits]:
        """What `logits` gives for each of them, in order."""
        ...


def outputs(runtime: Runtime, sequences: Sequence[Sequence[int]]) -> Iterator[Logits]:
    """Teacher-forced logits of each sequence, in order, each computed when it is asked for unless all are at once."""
    if isinstance(runtime, Together):
        yield from runtime.together(sequences)
    else:
        yield from map(runtime.logits, sequences)
