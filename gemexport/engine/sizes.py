"""What artefacts will come to, to the byte: what `gemexport plan` tells, and a run that may lack room looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gemexport.engine.disk import replaced
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.grids.expected import expected, expected_codec
from gemexport.request import Request, Step
from gemexport.shared.node import Node
from gemexport.shared.place import GRIDS, WORK


def artifact_sizes(asked: Request, checkpoint: Checkpoint, wanted: Sequence[Step]) -> dict[str, int]:
    """Bytes of each artefact by its node, as the functions that write it lay it out, on grids that a sample tells."""
    seen = expected(checkpoint, asked.out / WORK / GRIDS, asked.recipe)
    sizes = {}
    for step in wanted:
        on = seen if step.codec is None else expected_codec(seen, step.codec)
        options = asked.options.get(step.target.name, {})
        sizes[step.export_node] = int(step.target.exporter().size(on, variant=step.variant, **options))
    return sizes


def sized(nodes: Sequence[Node], sizes: Mapping[str, int], wanted: Sequence[Step]) -> list[Node]:
    """The nodes, with what their artefacts take of the disk."""
    paths = {step.export_node: step.path for step in wanted}
    return [
        _sized(node, replaced(sizes[node.name], paths[node.name])) if node.name in paths else node for node in nodes
    ]


def _sized(node: Node, found: tuple[int, int]) -> Node:
    writes, scratch = found
    return replace(node, writes=writes, scratch=scratch)
