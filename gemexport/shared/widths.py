"""How many bits an artefact's weights have, and whether these are the bits that it is called by."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from gemexport.formats.tensor import Tensor
from gemexport.shared.measured import TensorReport

# Q4_0, IQ4_XS, int4, w4a16; 4bit.
_CALLED = re.compile(r"(?:^|[-_. ])(?:(?:i?q|int|w)(\d)(?=$|[-_.]|a\d)|(\d)-?bit)", re.IGNORECASE)
MOSTLY = 0.9


def widths(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Weights by what they are stored in: "4 bit", "8 bit", "bf16"; the largest number first."""
    found: Counter[str] = Counter()
    for tensor in tensors:
        found[_called(tensor.dtype, tensor.width)] += math.prod(tensor.shape)
    return dict(found.most_common())


def reported_widths(tensors: Iterable[TensorReport]) -> dict[str, int]:
    """The same of tensors that a validator read back."""
    found: Counter[str] = Counter()
    for tensor in tensors:
        found[_called(tensor.dtype, None if tensor.grid is None else tensor.grid.grid().width)] += tensor.compared
    return dict(found.most_common())


def _called(dtype: str, width: int | None) -> str:
    """What a tensor's weights are stored in."""
    return dtype if width is None else f"{width} bit"


def called(variant: str) -> int | None:
    """The bits that a variant is called by; None for a name without any."""
    found = _CALLED.search(variant)
    return None if found is None else int(found[1] or found[2])


def short(variant: str, found: Mapping[str, int]) -> float | None:
    """The share of weights that have no more bits than the variant is called by; None where these are most of them."""
    bits, total = called(variant), sum(found.values())
    if bits is None or not total:
        return None
    held = sum(count for name, count in found.items() if name.endswith(" bit") and int(name.split()[0]) <= bits)
    return held / total if held / total < MOSTLY else None


def width_note(variant: str, found: Mapping[str, int]) -> list[str]:
    """A sentence about an artefact that has fewer weights of so many bits than its name says, if it is one."""
    share = short(variant, found)
    if share is None:
        return []
    total = sum(found.values())
    parts = ", ".join(f"{100 * count / total:.1f} % in {name}" for name, count in found.items() if count > total / 2000)
    return [f"it is called {called(variant)}-bit and holds {100 * share:.1f} % of its weights in that: {parts}"]
