"""The K-quant variants of a GGUF file: every matrix is quantized anew from its values, by ggml itself.

That is what a user asks for with them, and the bytes are those that llama-quantize makes of the same tensors. K-quants
hold no lattice, so the notes tell what lay on one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from gemexport.exporters.gguf.mix import MIXES, types
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gguf.container import Value, string, uint32
from gemexport.formats.gguf.imatrix import read_imatrix
from gemexport.formats.gguf.quantizer import check_installed, quantize
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import Floats, Rows, Tensor

K_BLOCK = 256  # weights in a block of every K type


class KQuants:
    """What one K-quant file does with each matrix, by the file's own names."""

    def __init__(
        self, checkpoint: Checkpoint, variant: str, names: Mapping[str, str], imatrix: Path | None = None
    ) -> None:
        """`names` are the file's by canonical ones.

        Raises InputError when ggml's quantizer is not installed, or when the importance matrix is broken or of another
        model.
        """
        check_installed()
        # What has no name of its own is part of a stack, which is not quantized.
        tensors = {names[name]: tensor for name, tensor in checkpoint.tensors.items() if name in names}
        known = {names[name]: spec for name, spec in checkpoint.model.specs.items() if name in names}
        self._specs = {name: replace(known[name], shape=item.shape) for name, item in tensors.items()}
        self._types = types(MIXES[variant], self._specs, len(checkpoint.architecture.layers))
        self._tensors = {name: tensors[name] for name in self._types}
        self._path = checkpoint.path
        self._imatrix = read_imatrix(imatrix) if imatrix else None
        self._importance = {name: self._importance_of(name) for name in self._types}

    def _importance_of(self, name: str) -> Floats | None:
        """The importance `[in]` of a matrix' columns, None where the file has none that fits."""
        found = self._imatrix.entries.get(name) if self._imatrix else None
        if self._imatrix is None or found is None:
            return None
        width = self._tensors[name].shape[-1]
        if found.size == width:
            return found
        if self._specs[name].role.is_looked_up:  # what llama-quantize passes over
            return None
        problem = f"has {found.size} importances for {name}, whose rows have {width} weights"
        raise InputError(self._imatrix.path, problem, "make it with llama-imatrix from this very model")

    def __contains__(self, name: str) -> bool:
        """Whether a tensor is quantized; llama.cpp leaves the others as they are."""
        return name in self._types

    def choose(self, name: str) -> tuple[Type, Callable[[Rows], NDArray[np.uint8]]]:
        """The type of a matrix, and the function that packs its rows."""
        kind, importance, tensor = self._types[name], self._importance[name], self._tensors[name]

        def pack(part: Rows) -> NDArray[np.uint8]:
            data = quantize(kind, part.values, importance)
            if data is None:
                problem = f"tensor {tensor.name} has weights that are not finite or too large for {kind.name}"
                raise InputError(self._path, problem, "mend the checkpoint, or use the variant BF16")
            return data

        return kind, pack

    def metadata(self) -> dict[str, Value]:
        """What llama-quantize says in the file about an importance matrix."""
        if self._imatrix is None:
            return {}
        found = {
            "quantize.imatrix.file": string(self._imatrix.path.name),
            "quantize.imatrix.entries_count": uint32(len(self._imatrix.entries)),
        }
        return found | ({"quantize.imatrix.chunks_count": uint32(self._imatrix.chunks)} if self._imatrix.chunks else {})

    def notes(self) -> list[str]:
        """What a reader of the report must know: lattices that were left, types that stand in, missing importances."""
        notes = []
        left = [tensor for tensor in self._tensors.values() if _on_lattice(tensor)]
        if left:
            notes.append(f"{_matrices(len(left))} left their lattice: K-quants are fitted to the values anew")
        others = Counter(kind.name for kind in self._types.values() if GGML_QUANT_SIZES[kind][0] != K_BLOCK)
        if others:
            kinds = ", ".join(f"{count} as {kind}" for kind, count in sorted(others.items()))
            notes.append(f"rows that are no multiple of {K_BLOCK} weights cannot be K-quants: {kinds}")
        without = [name for name, importance in self._importance.items() if importance is None]
        if self._imatrix and without:
            some = ", ".join(without[:3]) + (" …" if len(without) > 3 else "")
            notes.append(f"{self._imatrix.path.name} has no importances for {_matrices(len(without))} ({some})")
        return notes


def _on_lattice(tensor: Tensor) -> bool:
    return tensor.grid is not None and tensor.grid.lossless


def _matrices(count: int) -> str:
    return "1 matrix" if count == 1 else f"{count} matrices"
