"""The curve of a model before anything is written: the loss to be expected by size, of each format by itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from gemexport.engine.dag import sweeping
from gemexport.engine.disk import check_room
from gemexport.engine.memory import COMMAND
from gemexport.engine.output import claim
from gemexport.engine.scheduler import Scheduler
from gemexport.formats.gemma.model import LOGITS
from gemexport.formats.storage.errors import InputError, shown
from gemexport.formats.storage.files import atomic
from gemexport.registry import check_able
from gemexport.report.curves import draw_curves
from gemexport.report.render import size
from gemexport.request import Request, refusals, steps
from gemexport.shared.measured import Swept
from gemexport.shared.node import Events, value_of

JSON, PLOT = "sweep.json", "sweep.svg"


def sweep(asked: Request, events: Events | None = None) -> list[Swept]:
    """The points of every artefact that was asked for, the smallest first; leaves a table and a plot in `asked.out`.

    What was measured stays there too, and a run for a size or a loss in the same folder does not measure again. Raises
    InputError where there is nothing to choose, StepError where a step does not succeed.
    """
    checkpoint = asked.checkpoint()
    if checkpoint.model.gives != LOGITS:
        raise InputError(checkpoint.path, "gives no logits, whose loss a sweep is of", "use export")
    possible = steps(asked, checkpoint)
    check_able([step.target for step in possible], judged=True)
    refused = refusals(checkpoint, possible)
    wanted = [
        step
        for step in possible
        if step not in refused and not step.target.missing() and step.target.widths(step.variant)
    ]
    if not wanted:
        raise InputError("sweep", "none of these artefacts has widths to choose", "name formats with --only")
    with claim(asked.out, checkpoint, asked.fresh) as work:
        nodes = sweeping(asked, checkpoint, work, wanted)
        check_room(work, nodes, asked.jobs)
        scheduler = Scheduler(asked.jobs, asked.memory - COMMAND, work, events or Events(), source=checkpoint.stamps)
        with ThreadPoolExecutor(1) as beside:
            outcomes = scheduler.run(nodes, beside.submit(asked.place(work, checkpoint).plain().unpack))
        value_of("grids", outcomes)
        found: list[Swept] = value_of("sweep", outcomes)
        with atomic(asked.out / JSON) as partial:
            partial.write_text(as_json(found), "utf-8")
        with atomic(asked.out / PLOT) as partial:
            partial.write_text(draw_curves(found), "utf-8")
    return found


def as_json(found: Sequence[Swept]) -> str:
    """The points as a JSON list."""
    return json.dumps([asdict(point) for point in found], indent=1) + "\n"


def print_sweep(asked: Request, found: Sequence[Swept]) -> None:
    """Print the table."""
    console = Console(highlight=False, markup=False)
    table = Table("artefact", "size", "bits", "loss", "widths", box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:4]:
        column.justify = "right"
    for point in found:
        total = sum(point.weights.values())
        widths = ", ".join(f"{100 * count / total:.0f} % {name}" for name, count in point.weights.items())
        table.add_row(point.artefact, size(point.bytes), f"{point.bits:.2f}", f"{point.loss:.3g}", widths)
    console.print(table)
    told = "loss in nats, to be expected; --size or --max-kld with a format's command makes such an artefact"
    console.print(f"\n{told}\n{shown(str(asked.out / PLOT))} has the curves", soft_wrap=True)
