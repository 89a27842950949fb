"""Models of ONNX Runtime GenAI's model builder, read as the checkpoint they came from.

The builder stacks the projections of queries, keys and values, adds Gemma's 1 to its norms, and stores a tied
embedding as the head alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemexport.formats.gemma.dialects import GENAI_STACKED
from gemexport.formats.gemma.families import by_type
from gemexport.formats.gemma.names import CANONICAL, EMBEDDING, HEAD, WEIGHT, is_norm
from gemexport.formats.gemma.roles import Role
from gemexport.formats.storage.reading import read_optional_json
from gemexport.formats.tensor import ArrayTensor, Rows, Tensor, TensorBase

if TYPE_CHECKING:
    import onnx_ir as ir

PRODUCER = "onnxruntime-genai"


class RowRange(TensorBase):
    """Some of the rows of another tensor, under a name of their own."""

    def __init__(self, name: str, base: Tensor, start: int, stop: int) -> None:
        self.name, self.base, self.start = name, base, start
        self.shape: tuple[int, ...] = (stop - start, base.shape[1])
        self.dtype, self.grid = base.dtype, base.grid

    def rows(self, start: int, stop: int) -> Rows:
        return self.base.rows(self.start + start, self.start + stop)


def conform(found: dict[str, Tensor], graph: ir.Graph, folder: Path) -> dict[str, Tensor]:
    """The tensors of a builder's graph as the checkpoint has them."""
    heads = _heads(graph)
    offset = _norm_offset(folder)
    result: dict[str, Tensor] = {}
    for name, tensor in found.items():
        layer = name.removesuffix(GENAI_STACKED)
        if layer != name and layer in heads:
            result |= _unstacked(layer, tensor, *heads[layer])
        elif offset and is_norm(name):
            result[name] = ArrayTensor(name, tensor.numpy() - np.float32(offset), tensor.dtype)
        else:
            result[name] = tensor
    if HEAD in result and EMBEDDING not in result:
        head = result.pop(HEAD)
        result[EMBEDDING] = RowRange(EMBEDDING, head, 0, head.shape[0])
    return result


def _heads(graph: ir.Graph) -> dict[str, tuple[int, int]]:
    """Heads and key/value heads of each layer, by its name in the checkpoint."""
    found = {}
    for node in graph:
        layer = re.match(r"/(model/layers\.\d+)/attn/", node.name or "")
        if layer and node.op_type == "GroupQueryAttention":
            counts = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
            query, keys = counts
            found[layer[1].replace("/", ".")] = query, keys
    return found


def _unstacked(layer: str, tensor: Tensor, heads: int, kv_heads: int) -> dict[str, Tensor]:
    """Query, key and value projections out of the one that holds them in this order."""
    head_dim = tensor.shape[0] // (heads + 2 * kv_heads)
    result: dict[str, Tensor] = {}
    start = 0
    for role, count in ((Role.Q, heads), (Role.K, kv_heads), (Role.V, kv_heads)):
        name = f"{layer}.{CANONICAL.stem(role)}{WEIGHT}"
        result[name] = RowRange(name, tensor, start, start + count * head_dim)
        start += count * head_dim
    return result


def _norm_offset(folder: Path) -> float:
    """What the builder added to norms: that of the family that genai_config.json names; 0 when there is none."""
    said = read_optional_json(folder / "genai_config.json").get("model")
    family = by_type(str(said.get("type"))) if isinstance(said, dict) else None
    return 0.0 if family is None else family.norm_offset
