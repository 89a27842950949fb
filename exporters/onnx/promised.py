"""What the graphs of integers, `npu-a8` and `npu-a16`, have to hold of each tensor."""

from __future__ import annotations

import numpy as np

from gemexport.exporters.onnx.htp import by_rows, held_by_rows, row_grid
from gemexport.exporters.onnx.qdq import constant_encoding
from gemexport.formats.activations.ranges import Bits
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.names import EMBEDDING, HEAD
from gemexport.formats.promise import Anew, Promise, shifted_back
from gemexport.formats.tensor import Floats, Rows, Tensor


def integer_promises(checkpoint: Checkpoint, bits: Bits) -> dict[str, Promise]:
    """By canonical name: tables as they are, linears in codes with one scale a row, vectors in integers of `bits`."""
    found = {}
    for name, tensor in checkpoint.tensors.items():
        role = checkpoint.model.specs[name].role
        if not role.has_rows:
            offset = checkpoint.architecture.norm_offset if role.is_norm else 0.0
            found[name] = Promise(shifted_back(tensor, _Integers(offset, bits)))
        elif role.is_looked_up:
            found[name] = Promise(tensor)
            if name == EMBEDDING and checkpoint.architecture.tied:  # the head has columns of its own
                found[HEAD] = Promise(_by_rows(tensor))
        else:
            found[name] = Promise(_by_rows(tensor))
    return found


def _by_rows(tensor: Tensor) -> Tensor:
    if tensor.grid is not None and held_by_rows(tensor.grid, tensor.shape[1]):
        return tensor

    def rows(values: Floats) -> Rows:
        codes, scales = by_rows(Rows(values))
        return Rows(values, codes, scales)

    return Anew(tensor, row_grid(tensor), rows)


class _Integers:
    """What reads back of a vector that is stored as integers with `offset` added."""

    def __init__(self, offset: float, bits: Bits) -> None:
        self._offset, self._bits = offset, bits

    def __call__(self, values: Floats) -> Floats:
        moved = values + np.float32(self._offset)
        encoding = constant_encoding(moved, self._bits)
        codes = encoding.encode(moved).astype(np.float64)
        exact = (codes - encoding.zero_point) * np.float64(np.float32(encoding.scale))
        return (exact - self._offset).astype(np.float32)
