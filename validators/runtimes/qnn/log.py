"""What ONNX Runtime's verbose log says of operators that QNN's provider refuses.

The provider logs a group of nodes with a REASON. Where that is only that QNN's own validation failed, the lines before
it tell which operator with which types it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from gemexport.validators.runtimes.qnn.process import MARK

_GROUP = re.compile(
    r"Validation FAILED for \d+ nodes in [^\n]*?\((?P<operator>\w+)\) :\n"
    r"(?P<nodes>(?:\tOperator type: [^\n]*\n)+)\tREASON : (?P<reason>[^\n]*)"
)
_NODE = re.compile(r"\tOperator type: (?P<operator>\w+) Node name: (?P<name>.*) Node index: \d+")
_CONFIG = re.compile(
    r"Qnn_OpConfig node name: (?P<name>\S+) [^\n]*QNN_op_type: (?P<operator>\w+)[^\n]*\n"
    r"(?P<tensors>.*?)(?=\n\S*\d{4}-\d\d-\d\d|\Z)",
    re.DOTALL,
)
_TENSOR = re.compile(r"dataType=QNN_DATATYPE_(?P<type>\w+) rank=\d+ dimensions=\((?P<sizes>[\d ]*)\)")
_FAILED = re.compile(r"backendValidateOpConfig\(\) failed for node `(?P<name>[^`]+)` [^\n]*error code (?P<code>\d+)")


@dataclass(frozen=True)
class Refusal:
    """A node that the NPU does not take."""

    graph: str
    node: str
    operator: str
    reason: str


def refusals(log: str) -> list[Refusal]:
    """Every refused node once, in the order of the log; it holds the parts of several graphs."""
    found: dict[tuple[str, str], Refusal] = {}
    for part in re.split(rf"^{MARK}", log, flags=re.MULTILINE)[1:]:
        graph, _, text = part.partition("\n")
        for refusal in _of_graph(graph, text):
            found.setdefault((graph, refusal.node), refusal)
    return list(found.values())


def _of_graph(graph: str, text: str) -> Iterator[Refusal]:
    start = 0
    for group in _GROUP.finditer(text):
        nodes = [(item["operator"], item["name"]) for item in _NODE.finditer(group["nodes"])]
        # A group is an operator and the quantizing around it: the operator is what is refused.
        name = next((name for operator, name in nodes if operator == group["operator"]), nodes[0][1])
        detail = _validation(text[start : group.start()])
        reason = f"{group['reason']} {detail}" if detail else group["reason"]
        yield Refusal(graph, name, group["operator"], reason)
        start = group.end()


def _validation(text: str) -> str:
    """What QNN validated last, if that failed: its operator, types and sizes, and the error code."""
    failed = list(_FAILED.finditer(text))
    if not failed:
        return ""
    configs = [config for config in _CONFIG.finditer(text) if config["name"] == failed[-1]["name"]]
    if not configs:
        return f"(QNN error {failed[-1]['code']})"
    tensors = configs[-1]["tensors"].partition("node_params:")[0]
    inputs, _, outputs = tensors.partition("node_outputs:")
    kind, code = configs[-1]["operator"], failed[-1]["code"]
    return f"({kind} of {_tensors(inputs)} into {_tensors(outputs)}: QNN error {code})"


def _tensors(text: str) -> str:
    found = (f"{item['type']}[{','.join(item['sizes'].split())}]" for item in _TENSOR.finditer(text))
    return ", ".join(found)
