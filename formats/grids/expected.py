"""The grids that a checkpoint's matrices will have, as a sample of rows tells: what `find_grids` finds, at once.

For plans. Nothing here says that a tensor lies on a lattice: that takes all of its rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.names import PER_LAYER_EMBEDDING
from gemexport.formats.grids.additive import AdditiveTensor
from gemexport.formats.grids.lattice import code_bits, likely_block, sampled, search
from gemexport.formats.grids.recipe import Recipe, Scheme
from gemexport.formats.grids.search import FALLBACK, GridTensor, attach, fingerprint, held_everywhere, read_index
from gemexport.formats.grids.vector_codec import Codec, check
from gemexport.formats.tensor import DType, Grid, Tensor, holding, matrix_of


def expected(checkpoint: Checkpoint, folder: Path, recipe: Recipe) -> Checkpoint:
    """The checkpoint on the grids in `folder`, if they are its and of this recipe, else on those to be expected."""
    known = read_index(folder)
    if known is not None and known.fingerprint == fingerprint(checkpoint, recipe):
        return attach(checkpoint, folder)
    tensors, fallbacks = dict(checkpoint.tensors), dict(checkpoint.fallbacks)
    matrices = {name: tensor for name, tensor in tensors.items() if len(tensor.shape) >= 2}
    found = {name: _on_lattice(tensor) for name, tensor in matrices.items() if tensor.grid is None}
    bases = {name: base for name, base in checkpoint.bases.items() if name in found and found[name] is None}
    left = {name for name, base in bases.items() if base.grid is not None or _on_lattice(base) is not None}
    chosen = recipe.chosen({name: None if name not in found else found[name] is not None for name in matrices}, left)
    for name, tensor in matrices.items():
        if tensor.grid is not None:
            second = None if held_everywhere(tensor.grid) else rounded(tensor, FALLBACK)
            fallbacks |= {} if second is None else {name: second}
        elif name in chosen:
            tensors[name] = rounded(tensor, chosen[name]) or tensor
        else:
            tensors[name] = found[name] or tensor
    return replace(checkpoint, tensors=tensors, fallbacks=fallbacks)


def expected_codec(checkpoint: Checkpoint, codec: Codec) -> Checkpoint:
    """The checkpoint with its per-layer embeddings in a vector codec, codes and scales all nought."""
    layers = check(codec, checkpoint.architecture.per_layer, checkpoint.path)
    tensor = checkpoint.tensors[PER_LAYER_EMBEDDING]
    out, width = tensor.shape
    codes = np.broadcast_to(np.uint8(0), (out, width // codec.vector, codec.codebooks))
    scales = np.broadcast_to(np.float16(0), (out, width // layers.dim))
    books = np.zeros((codec.codebooks, codec.entries, codec.vector), np.float32)
    coded = AdditiveTensor(tensor.name, codec, codes, books, scales, 0.0)
    return replace(checkpoint, tensors={**checkpoint.tensors, tensor.name: coded})


def _on_lattice(tensor: Tensor) -> GridTensor | None:
    """The tensor on the lattice that its sample lies on, all rows with the scales of the first."""
    block = likely_block(tensor)
    if block is None:
        return None
    values = sampled(tensor)
    scales, _ = search(values, block, tensor.dtype)
    dtype: DType = next(iter(holding(scales, ("bf16", "f16"))), "f32")
    rows = matrix_of(tensor.shape)[0]
    return GridTensor(
        tensor,
        Grid(code_bits(values, scales), block, dtype, lossless=True),
        np.broadcast_to(scales[:1], (rows, scales.shape[1])),
    )


def rounded(tensor: Tensor, scheme: Scheme) -> GridTensor | None:
    """The tensor in a scheme, with scales of 1; None where it stays as it is."""
    rows, width = matrix_of(tensor.shape)
    if width % scheme.group_size:
        return None
    grid = Grid(scheme.bits, scheme.group_size, "f16", lossless=False)
    return GridTensor(tensor, grid, np.broadcast_to(np.float32(1), (rows, width // scheme.group_size)))
