"""Static activation scales: how a checkpoint says that the inputs and outputs of its linears become integers.

A format or a runtime that has a place for them computes with them; the others are told about as left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Quantizer:
    """x is replaced by (clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale, ties to even."""

    scale: float  # positive, a float32
    zero_point: int = 0
    bits: int = 8
    signed: bool = True

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest integer."""
        low = -(1 << (self.bits - 1)) if self.signed else 0
        return low, low + (1 << self.bits) - 1


@dataclass(frozen=True)
class LinearActivations:
    """What goes into a linear and what comes out; None where that stays as it is."""

    input: Quantizer | None = None
    output: Quantizer | None = None


@dataclass(frozen=True)
class CacheActivations:
    """The keys, after rotation, and the values that a layer caches."""

    key: Quantizer | None = None
    value: Quantizer | None = None


NOTHING = LinearActivations()


@dataclass(frozen=True)
class Activations:
    """The static scales of a decoder; only what has any is listed."""

    linears: Mapping[str, LinearActivations] = field(default_factory=dict)  # by the weight's canonical name
    caches: Mapping[int, CacheActivations] = field(default_factory=dict)  # by the layer that owns the cache

    def linear(self, weight: str) -> LinearActivations:
        """Those of the linear with this weight; without quantizers when it has none."""
        return self.linears.get(weight, NOTHING)

    def where(self, fits: Callable[[Quantizer], bool]) -> Activations:
        """Those of linears and caches whose quantizers all fit."""

        def whole(both: LinearActivations | CacheActivations) -> bool:
            return all(side is None or fits(side) for side in vars(both).values())

        return Activations(
            {name: both for name, both in self.linears.items() if whole(both)},
            {layer: both for layer, both in self.caches.items() if whole(both)},
        )

    def without_caches(self) -> Activations:
        """The same for keys and values in floating point."""
        return replace(self, caches={})

    def differences(self, stored: Activations | None) -> Iterator[str]:
        """What `stored` computes with other scales than these, or without any here, by weight or layer, and side.

        What it has left out is in floating point: no difference, but a loss that its notes tell of. Integers of a width
        or sign that these have nowhere are of ranges that an exporter measured, and not these at all.
        """
        found = stored or Activations()
        pairs: list[tuple[str, object, object]] = [
            *((weight, both, self.linear(weight)) for weight, both in found.linears.items()),
            *(
                (f"cache of layer {i}", both, self.caches.get(i, CacheActivations()))
                for i, both in found.caches.items()
            ),
        ]
        both = (*self.linears.values(), *self.caches.values())
        kinds = {(item.bits, item.signed) for one in both for item in vars(one).values() if item is not None}
        for name, theirs, ours in pairs:
            for side, quantizer in vars(theirs).items():
                known = quantizer is not None and (quantizer.bits, quantizer.signed) in kinds
                if known and quantizer != getattr(ours, side):
                    yield f"{name}, {side}"

    def digest(self) -> str:
        """Equal for equal scales, whatever the order in which they were found."""
        found = sorted(self.linears.items()), sorted(self.caches.items())
        return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()

    def __bool__(self) -> bool:
        return bool(self.linears or self.caches)
