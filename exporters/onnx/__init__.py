"""Writes a Gemma decoder as ONNX: for ONNX Runtime (`int4`, `f32`) and for NPU compilers (`npu`, `npu-a8`, `npu-a16`).

`int4` keeps codes packed in ONNX Runtime's fused operators and `f32` keeps every weight in the source's dtype; both
compute in f32. `npu` has static shapes and the standard's operators alone; the other two are that with integers of 8
or 16 bits for activations.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gemexport.exporters.support import embeddings, experts, streams
from gemexport.formats.gemma.model import Model

if TYPE_CHECKING:
    from gemexport.exporters.onnx.writing import CONTEXT, PREFILL, container, export, placed, promises, ranges, size

    __all__ = ["CONTEXT", "PREFILL", "VARIANTS", "container", "export", "placed", "promises", "ranges", "size"]

INTEGERS = ("npu-a8", "npu-a16")  # variants with integers for activations
VARIANTS = ("int4", "npu", "f32", *INTEGERS)
WHOLE = ("int4", "f32")  # variants of one graph with free sizes


def supports(model: Model, variant: str) -> str | None:
    """Why no graph is written of a model; None where it does."""
    # A token would go through all experts in integers, and the sizes of streams are of no range that was measured.
    found = experts(model) or streams(model) if variant in INTEGERS else None
    found = found or (embeddings(model) if variant not in WHOLE else None)
    return None if found is None else f"the graphs do not compute this decoder: {found}"


def __getattr__(name: str) -> Any:
    """What writes takes half a second of a processor to load; whoever asks what is supported has no use for it."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(import_module(f"{__name__}.writing"), name)
