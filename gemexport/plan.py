"""The DAG of a request in words: `gemexport plan`."""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gemexport.engine.dag import graph
from gemexport.engine.disk import artifact_bytes
from gemexport.formats.storage.errors import shown
from gemexport.report.render import size
from gemexport.request import Request, steps
from gemexport.shared.place import WORK


def print_plan(asked: Request, as_json: bool) -> None:
    """Print the DAG of a request with sizes and memory estimates; nothing is run or written."""
    checkpoint = asked.checkpoint()
    checkpoint.unpack()  # what a run would refuse, a plan does
    wanted = steps(asked, checkpoint)
    nodes = graph(asked, checkpoint, asked.out / WORK, wanted)
    expected = {step.export_node: artifact_bytes(checkpoint.tensors, step.variant) for step in wanted}
    without = [step.key for step in wanted if step.target.missing()]
    refused = {
        step.export_node: reason
        for step in wanted
        if step.key not in without and (reason := step.target.supports(checkpoint.model, step.variant))
    }
    rows = [
        {
            "step": node.name,
            "after": list(node.needs),
            "memory_bytes": node.memory,
            "output_bytes": 0 if node.name in refused else expected.get(node.name, 0),
            **({"refused": refused[node.name]} if node.name in refused else {}),
        }
        for node in nodes
    ]
    if as_json:
        print(json.dumps({"jobs": asked.jobs, "memory_bytes": asked.memory, "steps": rows}, indent=2))
        return
    console = Console(highlight=False)
    table = Table("step", "after", "memory", "writes about", box=None, pad_edge=False, header_style="bold")
    for node in nodes:
        written = None if node.name in refused else expected.get(node.name)
        table.add_row(node.name, ", ".join(node.needs), size(node.memory), size(written) if written else "")
    console.print(table)
    limits = f"{asked.jobs} at a time, within {size(asked.memory)}"
    console.print(f"\n{limits}; artefacts go to {escape(shown(str(asked.out)))}", soft_wrap=True)
    for name, reason in refused.items():
        console.print(f"{escape(shown(name))} will be refused: {escape(shown(reason))}", style="yellow", soft_wrap=True)
    if without:
        console.print(f"not installed, and left out: {', '.join(without)}", style="yellow")
