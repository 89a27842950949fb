"""What a graph adds to the score of a token that is not to be seen.

A share of e^-20 is too little for logits to tell from another order of summing, and an answer of a hundred thousand
tokens has as many of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemexport.shared.measured import FactReport

if TYPE_CHECKING:
    import onnx_ir as ir

HIDDEN = -1e4  # or less: what is written where f16 has to hold it
RUN = 0.9  # of the steps of a constant that are 1, or more: what counts positions back from the last token
STEPS = 4  # from a mask to the softmax: added, and perhaps reshaped or cast


def mask_differences(target: str, path: Path) -> tuple[FactReport, ...]:
    """Every choice between 0 and another number of an ONNX folder that reaches a softmax and hides too little.

    And every position that a graph of fixed size gives to a key of its cache, where it is not the next one's.
    """
    return tuple(_onnx(path)) if target == "onnx" else ()


def _onnx(path: Path) -> Iterator[FactReport]:
    from gemexport.formats.onnx import graph_files, read_model

    for file in graph_files(path):
        for node in read_model(file).graph:
            yield from _counted(node, file)
            if node.op_type == "Where" and _reaches_softmax(node, STEPS):
                added = [number for value in node.inputs[1:] if (number := _number(value)) is not None]
                if len(added) == 2 and max(added) == 0 > min(added) > HIDDEN:
                    name = f"what {file.name}: {node.name} adds to scores of tokens that are not seen"
                    yield FactReport(name=name, found=f"{min(added):g}", expected=f"{HIDDEN:g} or less")


def _counted(node: ir.Node, file: Path) -> Iterator[FactReport]:
    """The first step of a row of positions that end with the last token's, added to that, that is not one."""
    from gemexport.formats.onnx.stored import Elements

    for value in node.inputs if node.op_type == "Add" else ():
        stored = None if value is None else value.const_value
        if value is None or stored is None or stored.dtype.name not in ("INT32", "INT64") or stored.size < 3:
            continue
        row = Elements(value, file).whole().reshape(-1)
        steps = np.diff(row)
        if row[-1] == 0 and RUN <= np.mean(steps == 1) < 1:
            place = int(np.argmax(steps != 1))
            name = f"the step of {file.name}: {node.name} from position {row[place]} to the next"
            yield FactReport(name=name, found=str(steps[place]), expected="1")


def _number(value: ir.Value | None) -> float | None:
    """A floating-point constant that is a single number."""
    stored = None if value is None else value.const_value
    if stored is None or stored.size != 1 or not stored.dtype.is_floating_point():
        return None
    return float(np.asarray(stored.numpy(), np.float32).reshape(-1)[0])


def _reaches_softmax(node: ir.Node, steps: int) -> bool:
    users = [use.node for output in node.outputs for use in output.uses()]
    if any(user.op_type == "Softmax" for user in users):
        return True
    return steps > 1 and any(_reaches_softmax(user, steps - 1) for user in users)
