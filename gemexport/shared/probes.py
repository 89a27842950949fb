"""What a model is judged on, by what it gives: the one place that says how that is asked for, compared and reported.

Logits of each position are compared by divergence, the vector of a text by its distance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from gemexport.formats.gemma.model import EMBEDDING, LOGITS, Model
from gemexport.shared.measured import Divergence
from gemexport.shared.vectors import VectorDistance

if TYPE_CHECKING:
    from gemexport.formats.gemma.architecture import Architecture
    from gemexport.validators.checks.prompts import Passage
    from gemexport.validators.runtimes.protocol import Runtime

Kinds = Sequence[tuple[str, int]]  # of sequences, and how long each is


class Sums(Protocol):
    """What was compared so far."""

    def add(self, p: Any, q: Any, tokens: list[int]) -> None:
        """Add a sequence: what the reference gave and what another did."""


class Probe(Protocol):
    """How what a model gives is judged."""

    name: ClassVar[str]  # of what it gives, as a verdict calls it
    continues: ClassVar[bool]  # whether a program goes on with what it gave, token by token through a cache
    prefixes: ClassVar[bool]  # whether what is given of the beginning of a sequence is the beginning of what is given

    def passages(self, encoded: Mapping[str, Sequence[int]], decoder: Architecture, tokens: int) -> list[Passage]:
        """Sequences of `tokens` tokens in all, out of the built-in texts and their ids."""

    def ask(self, runtime: Runtime, sequences: Sequence[Sequence[int]]) -> Iterator[Any]:
        """What a program gives of each sequence, in order, computed when it is asked for."""

    def sums(self, tie: float | None = None) -> Sums:
        """Nothing compared yet; choices nearer than `tie`, in nats, are none."""

    def figures(self, sums: Any, kinds: Kinds = ()) -> Any:
        """As a report tells it, by kind of text too where these are given; its `mean` is what bounds are of."""

    def read(self, figures: Any) -> Any:
        """The same out of JSON."""


class _Logits:
    name: ClassVar[str] = LOGITS
    continues: ClassVar[bool] = True
    prefixes: ClassVar[bool] = True

    def __init__(self, choice: tuple[int, int] | None = None) -> None:
        self._choice = choice

    def passages(self, encoded: Mapping[str, Sequence[int]], decoder: Architecture, tokens: int) -> list[Passage]:
        from gemexport.validators.checks import prompts

        return prompts.passages(encoded, decoder, tokens)

    def ask(self, runtime: Runtime, sequences: Sequence[Sequence[int]]) -> Iterator[Any]:
        from gemexport.validators.runtimes.protocol import outputs

        return outputs(runtime, sequences)

    def sums(self, tie: float | None = None) -> Sums:
        from gemexport.validators.checks import divergence

        return divergence.Divergence(tie=tie, choice=self._choice)

    def figures(self, sums: Any, kinds: Kinds = ()) -> Divergence:
        return Divergence.of(sums, kinds)

    def read(self, figures: Any) -> Divergence:
        return Divergence.model_validate(figures)


class _Vectors:
    name: ClassVar[str] = EMBEDDING
    continues: ClassVar[bool] = False
    prefixes: ClassVar[bool] = False

    def passages(self, encoded: Mapping[str, Sequence[int]], decoder: Architecture, tokens: int) -> list[Passage]:
        from gemexport.validators.checks import prompts

        return prompts.whole_texts(encoded, decoder, tokens)

    def ask(self, runtime: Runtime, sequences: Sequence[Sequence[int]]) -> Iterator[Any]:
        return map(runtime.vector, sequences)  # type: ignore[attr-defined]

    def sums(self, tie: float | None = None) -> Sums:
        from gemexport.validators.checks import distance

        return distance.Distance()

    def figures(self, sums: Any, kinds: Kinds = ()) -> VectorDistance:
        return VectorDistance.of(sums, kinds)

    def read(self, figures: Any) -> VectorDistance:
        return VectorDistance.model_validate(figures)


def probe_of(model: Model) -> Probe:
    """How what a model gives is judged."""
    return _Vectors() if model.gives == EMBEDDING else _Logits(model.choice)
