"""Experts in compressed-tensors: a module for each projection of each one, as llm-compressor writes them.

That is what vLLM reads (vllm/model_executor/models/gemma4.py). transformers 5.23 makes stacks of such modules for other
families, not for Gemma 4: it is to be told (docs/compressed-tensors.md).
"""

from __future__ import annotations

from dataclasses import replace

from gemexport.exporters.compressed_tensors.schemes import PACKED, Scheme, scheme_of
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.roles import Kind
from gemexport.formats.gemma.stacks import apart, by_expert
from gemexport.formats.tensor import Plain

TOLD = (
    "transformers 5.23 does not know Gemma 4's experts by module: serve it with vLLM, or see docs/compressed-tensors.md"
)


def modules(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """The checkpoint with its experts as modules, where kernels have a scheme for them, and notes.

    Kernels want one scheme for all experts, without zero points. Experts on other grids stay whole, in floats, which
    transformers and vLLM read as well. So do routers: vLLM has them in floats always.
    """
    roles = {name: spec.role for name, spec in checkpoint.model.specs.items()}
    experts = [tensor for name, tensor in checkpoint.tensors.items() if roles[name].kind is Kind.EXPERT]
    if not experts:
        return checkpoint, []
    schemes = {tensor.grid and scheme_of(tensor.grid, tensor.shape[-1]) for tensor in experts}
    scheme = next(iter(schemes))
    one = len(schemes) == 1 and isinstance(scheme, Scheme) and scheme.format == PACKED and scheme.symmetric
    left = {Kind.ROUTER} if one else {Kind.ROUTER, Kind.EXPERT}
    tensors = {
        name: Plain(tensor) if roles[name].kind in left else tensor for name, tensor in checkpoint.tensors.items()
    }
    notes = [
        f"{name} stays {tensor.dtype}: vLLM has no router of codes"
        for name, tensor in checkpoint.tensors.items()
        if roles[name].kind is Kind.ROUTER and tensor.grid is not None
    ]
    if one:
        tensors = apart(tensors, checkpoint.model.specs, by_expert)
        notes.append(TOLD)
    elif any(tensor.grid for tensor in experts):
        notes.append("experts stay floats: kernels want one scheme for all of them, and no zero points")
    return replace(checkpoint, tensors=tensors), notes
