"""What is wrong with weights that could have stayed as they were, in plain sentences, whoever made the artefact."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from gemexport.shared.measured import TensorReport

SCALES = "scales are not the checkpoint's"
CODES = "codes are not the checkpoint's, on its scales"
ROUNDED = "codes are the checkpoint's, scales are rounded"


def diagnose(tensors: Iterable[TensorReport]) -> tuple[str, ...]:
    """A sentence for each sort of fault, that of the most weights first; tensors that are exact are passed over."""
    sorts: defaultdict[str, list[TensorReport]] = defaultdict(list)
    for tensor in tensors:
        if tensor.exact < tensor.compared:
            sorts[fault(tensor)].append(tensor)
    most = sorted(sorts.items(), key=lambda item: -sum(tensor.compared for tensor in item[1]))
    return tuple(f"{what}: {percent(found)} of the weights exact" + _where(found) for what, found in most)


def rounded_as_run(runtime: str, tensors: Iterable[TensorReport]) -> tuple[str, ...]:
    """A sentence where the runtime makes other numbers of the weights than the file's."""
    found = [tensor for tensor in tensors if tensor.exact_as_run is not None]
    compared, exact = sum(tensor.compared for tensor in found), sum(tensor.exact_as_run or 0 for tensor in found)
    if exact == compared:
        return ()
    return (
        f"{runtime} rounds weights to the dtype of their scales: {exact / compared:.2%} of them are exact as it runs",
    )


def fault(tensor: TensorReport) -> str:
    """What happened to a tensor whose weights are not all the source's."""
    source, stored = tensor.source_grid, tensor.grid
    if source is None or not source.lossless:
        return f"rounded to {stored}" if stored else f"rounded to {tensor.dtype}"
    if stored is None:
        return f"without codes, rounded to {tensor.dtype}"
    if tensor.requantized:
        return f"codes are fitted anew as {stored}"
    if (stored.bits, stored.block) != (source.bits, source.block) or stored.kind == "codebook" != source.kind:
        return f"another grid, {stored} for the checkpoint's {source}"
    if tensor.scale_rounded:
        return ROUNDED
    return SCALES if _by_scales(tensor) else CODES


def percent(tensors: Iterable[TensorReport]) -> str:
    """The share of exact weights, rounded down: what is not exact is never 100 %."""
    compared, exact = 0, 0
    for tensor in tensors:
        compared, exact = compared + tensor.compared, exact + tensor.exact
    tenths = 1000 * exact // max(compared, 1)
    return f"{tenths // 10}.{tenths % 10} %"


def _by_scales(tensor: TensorReport) -> bool:
    """Whether blocks with another scale account for most of the weights that changed."""
    if tensor.same_scales is None:
        return True
    return (1 - tensor.same_scales) * tensor.compared >= (tensor.compared - tensor.exact) / 2


def _where(found: list[TensorReport]) -> str:
    return f" in {len(found)} matrices" if len(found) > 1 else f" in {found[0].name}"
