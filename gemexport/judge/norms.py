"""What the norms of a graph add to the mean square, against the checkpoint's epsilon.

Logits may not show it: of one norm among dozens it moves them by less than two right programs differ. A GGUF file and a
config.json state one number for all, which is compared with the decoder's other facts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemexport.formats.gemma.architecture import Architecture
from gemexport.shared.measured import FactReport

NORMS = ("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
ALIKE = 1e-3  # an f16 constant is a rounded one


def epsilon_differences(target: str, path: Path, decoder: Architecture) -> tuple[FactReport, ...]:
    """Every norm of an ONNX folder or a Core ML package that adds another number, by its operator's name."""
    found = {"onnx": _onnx, "coreml": _core_ml}.get(target)
    if found is None:
        return ()
    return tuple(
        FactReport(name=f"the epsilon of {name}", found=f"{size:.4g}", expected=f"{decoder.rms_norm_eps:.4g}")
        for name, size in found(path)
        if not math.isclose(size, decoder.rms_norm_eps, rel_tol=ALIKE)
    )


def _onnx(path: Path) -> Iterator[tuple[str, float]]:
    from gemexport.formats.onnx import graph_files, read_model

    for file in graph_files(path):
        for node in read_model(file).graph:
            if node.op_type in NORMS:
                # What the operators add where they do not say it.
                yield f"{file.name}: {node.name}", node.attributes.get_float("epsilon", 1e-5)


def _core_ml(path: Path) -> Iterator[tuple[str, float]]:
    """The roots of means: coremltools has no norm of this kind in one operation."""
    from gemexport.formats.coreml.package import open_package

    made = {output.name: operation for operation in open_package(path).operations for output in operation.outputs}
    for name, operation in made.items():
        if operation.type == "rsqrt" and _made_by(made, operation, "x") == "reduce_mean":
            constant = (
                made.get(operation.inputs["epsilon"].arguments[0].name) if "epsilon" in operation.inputs else None
            )
            values = None if constant is None else _numbers(constant)
            if values:
                yield name, float(values[0])


def _made_by(made: dict[str, Any], operation: Any, argument: str) -> str:
    source = made.get(operation.inputs[argument].arguments[0].name)
    return "" if source is None else str(source.type)


def _numbers(constant: Any) -> Any:
    return constant.attributes["val"].immediateValue.tensor.floats.values if constant.type == "const" else None
