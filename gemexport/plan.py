"""The DAG of a request in words: `gemexport plan`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gemexport.engine.dag import graph
from gemexport.engine.disk import required
from gemexport.engine.sizes import artifact_sizes, sized
from gemexport.formats.storage.errors import shown
from gemexport.registry import check_able
from gemexport.report.render import size
from gemexport.request import Request, refusals, steps
from gemexport.shared.node import Node
from gemexport.shared.place import WORK


def print_plan(asked: Request, as_json: bool) -> None:
    """Print the DAG of a request with the sizes of its artefacts and memory estimates; nothing is run or written."""
    checkpoint = asked.checkpoint()
    checkpoint.unpack()  # what a run would refuse, a plan does
    possible = steps(asked, checkpoint)
    check_able([step.target for step in possible], judged=False)
    wanted = [step for step in possible if not step.target.missing()]
    refused = {step.export_node: reason for step, reason in refusals(checkpoint, wanted).items()}
    wanted = [step for step in wanted if step.export_node not in refused]
    sizes = artifact_sizes(asked, checkpoint, wanted)
    nodes = sized(graph(asked, checkpoint, asked.out / WORK, wanted), sizes, wanted)
    plan = {
        "jobs": asked.jobs,
        "memory_bytes": asked.memory,
        "artifact_bytes": sum(sizes.values()),
        "disk_bytes": required(nodes, asked.jobs),
        "free_bytes": shutil.disk_usage(_existing(asked.out)).free,
        "steps": [_row(node, sizes) for node in nodes],
        "refused": refused,
        "not_installed": [step.key for step in possible if step.target.missing()],
    }
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    _print(plan, nodes, sizes, asked.out)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _row(node: Node, sizes: Mapping[str, int]) -> dict[str, Any]:
    return {
        "step": node.name,
        "after": list(node.needs),
        "memory_bytes": node.memory,
        "output_bytes": sizes.get(node.name, 0),
    }


def _print(plan: Mapping[str, Any], nodes: Sequence[Node], sizes: Mapping[str, int], out: Path) -> None:
    console = Console(highlight=False)
    table = Table("step", "after", "memory", "writes", box=None, pad_edge=False, header_style="bold")
    for node in nodes:
        written = size(sizes[node.name]) if node.name in sizes else ""
        table.add_row(node.name, ", ".join(node.needs), size(node.memory), written)
    table.add_row("all artefacts", "", "", size(plan["artifact_bytes"]), style="bold")
    console.print(table)
    limits = f"{plan['jobs']} at a time, within {size(plan['memory_bytes'])}"
    console.print(f"\n{limits}; artefacts go to {escape(shown(str(out)))}", soft_wrap=True)
    short = plan["disk_bytes"] > plan["free_bytes"]
    disk = f"the run takes up to {size(plan['disk_bytes'])} of the disk, of which {size(plan['free_bytes'])} are free"
    console.print(disk, style="red" if short else "", soft_wrap=True)
    for name, reason in plan["refused"].items():
        console.print(f"{escape(shown(name))} will be refused: {escape(shown(reason))}", style="yellow", soft_wrap=True)
    if plan["not_installed"]:
        console.print(f"not installed, and left out: {', '.join(plan['not_installed'])}", style="yellow")
