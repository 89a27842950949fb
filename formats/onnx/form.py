"""What the operators that are read here must have, whoever wrote the graph: inputs, outputs, and attributes of a type.

What protobuf lets through may be no operator: a damaged file can have an attribute of floats where an integer belongs.
(https://onnx.ai/onnx/operators/, and ContribOperators.md of ONNX Runtime.)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemexport.formats.storage.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

BROKEN = "export or download it again"
# Least number of inputs.
INPUTS = {
    "Cast": 1, "Identity": 1, "Transpose": 1, "Concat": 1, "MatMul": 2, "Gemm": 2, "DequantizeLinear": 2,
    "QuantizeLinear": 2, "MatMulNBits": 3, "GatherBlockQuantized": 3, "GroupQueryAttention": 1,
    "RMSNormalization": 2, "SimplifiedLayerNormalization": 2, "SkipSimplifiedLayerNormalization": 3,
}  # fmt: skip
TYPES = {
    **dict.fromkeys(("axis", "block_size", "bits", "to", "transB", "output_dtype", "num_heads", "kv_num_heads"), "INT"),
    **dict.fromkeys(("local_window_size", "accuracy_level", "sliding_window_cache"), "INT"),
    "perm": "INTS", "epsilon": "FLOAT",
}  # fmt: skip
ELEMENT_TYPES = ("to", "output_dtype")  # attributes that are the number of one
COUNTS = {"GroupQueryAttention": ("num_heads", "kv_num_heads")}  # attributes that must be there, and be positive
WIDTHS = (2, 4, 8)  # bits of a code that a fused operator unpacks


def check(graph: ir.Graph, file: Path) -> None:
    """Raise InputError, naming file and operator, for an operator that is not what its kind is."""
    for node in graph:
        problem = _problem(node) if node.op_type in INPUTS else None
        if problem is not None:
            raise InputError(file, f"{node.op_type} {node.name} {problem}", BROKEN)


def _problem(node: ir.Node) -> str | None:
    """What is wrong with an operator; None where nothing is."""
    import onnx_ir as ir

    if len(node.inputs) < INPUTS[node.op_type] or not node.outputs:
        return f"has {len(node.inputs)} inputs and {len(node.outputs)} outputs"
    for name, wanted in TYPES.items():
        found = node.attributes.get(name)
        if found is None:
            continue
        if found.type.name != wanted or found.value is None:
            return f"has an attribute {name} of type {found.type.name}, not {wanted}"
        if name in ELEMENT_TYPES and found.value not in set(ir.DataType):
            return f"has an attribute {name} of {found.value}, which is no type of elements"
    for name in COUNTS.get(node.op_type, ()):
        if node.attributes.get_int(name, 0) < 1:
            return f"has no attribute {name}"
    order = node.attributes.get("perm")
    if order is not None and sorted(order.value) != list(range(len(order.value))):
        return f"has an attribute perm of {list(order.value)}, which is no order of axes"
    return None
