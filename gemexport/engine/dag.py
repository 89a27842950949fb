"""The DAG of a request: which step waits for which, and what each may take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from gemexport.compress import PERCENT
from gemexport.engine.artefact import Artefact
from gemexport.engine.calibration import OWN, ranges_file
from gemexport.engine.disk import artifact_bytes, replaced
from gemexport.engine.memory import (
    COMMAND,
    export_memory,
    judging_memory,
    logits_memory,
    multiplied,
    reference_memory,
    rounding_memory,
    search_memory,
    sensitivity_memory,
    validator_room,
)
from gemexport.engine.rounding import ENOUGH, candidates, head, rounded, rounds
from gemexport.engine.sensitivity import scratch_bytes
from gemexport.engine.settling import TRIES
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.model import LOGITS
from gemexport.formats.grids.recipe import Recipe
from gemexport.formats.grids.search import GridIndex
from gemexport.formats.grids.vector_codec import Codec
from gemexport.formats.storage.errors import InputError
from gemexport.request import Request, Step
from gemexport.shared.measured import Allocated
from gemexport.shared.node import Call, Node, Outcome
from gemexport.shared.place import Asked, Place, played_of


def graph(asked: Request, checkpoint: Checkpoint, work: Path, wanted: list[Step]) -> list[Node]:
    """The DAG of a request."""
    place = asked.place(work, checkpoint)
    weights, recipe, nodes = checkpoint.architecture.parameters(), asked.recipe, []
    before: tuple[str, ...] = ()
    if asked.compression is not None:
        call = Call("gemexport.compress:compress", {"place": place, "asked": asked.compression, "recipe": recipe})
        room, plain = logits_memory(checkpoint, asked.tokens), checkpoint.plain_nbytes()
        # A copy for llm-compressor and what it makes of that; then that again, with what it left as it was.
        nodes.append(
            Node("compress", call, memory=room, total=PERCENT, writes=plain // 2, scratch=2 * plain, all_cores=True)
        )
        # The codes are ours, not those of a maker who left the rest as it is on purpose.
        before, recipe = ("compress",), recipe.model_copy(update={"requantize_mixed": True})
    call = Call("gemexport.engine.steps:grids", {"place": place, "recipe": recipe})
    scales = replaced(weights // 16, place.grids)[0]  # of 16 bits, one for 32 weights
    searching = search_memory(checkpoint)
    nodes.append(Node("grids", call, before, memory=searching, total=weights, writes=scales, light=True))
    artefacts = allocated(asked, checkpoint, wanted)
    if artefacts:
        place = replace(place, allocated=True)
        nodes.append(allocation(asked, checkpoint, place, artefacts))
    if wanted and rounds(asked.recipe, asked.compression is not None):
        nodes.append(rounding(asked, checkpoint, place))
    nodes += codecs(checkpoint, place, wanted)
    nodes += calibrations(asked, checkpoint, place, recipe, wanted)
    nodes += [export(asked, checkpoint, place, step, wanted[:number]) for number, step in enumerate(wanted)]
    if asked.validate and wanted:
        nodes += validators(asked, checkpoint, place, [(step, step.export_node) for step in wanted])
    return nodes


def allocated(asked: Request, checkpoint: Checkpoint, wanted: Sequence[Step]) -> list[Artefact]:
    """The artefacts that widths are chosen for; none without a goal. InputError for one that has no widths to choose.

    A loss is but judged where there are none, where llm-compressor or a codec has chosen, and of a model that gives no
    logits, of which none is measured.
    """
    if asked.goal is None:
        return []
    others = asked.compression is not None or any(asked.ple_codec) or checkpoint.model.gives != LOGITS
    without = [step for step in wanted if others or not step.target.widths(step.variant)]
    if without and asked.goal.kind != "max_kld":
        problem = f"chooses widths, and those of {without[0].key} are given already or cannot be chosen by a loss"
        raise InputError(f"--{asked.goal.kind}", problem, "leave out one of the two")
    return [
        Artefact(step.target.name, step.variant, asked.options.get(step.target.name, {}))
        for step in wanted
        if step not in without
    ]


def allocation(asked: Request, checkpoint: Checkpoint, place: Place, artefacts: Sequence[Artefact]) -> Node:
    """The node that chooses widths."""
    arguments = {
        "place": place, "recipe": asked.recipe, "goal": asked.goal, "artefacts": artefacts, "text": asked.calibration,
    }  # fmt: skip
    call, layers = Call("gemexport.engine.budget:allocate_widths", arguments), checkpoint.architecture.layers
    weights, logits = checkpoint.architecture.parameters(), 4 * asked.tokens * checkpoint.architecture.vocab_size
    settles = asked.goal is not None and asked.goal.kind == "max_kld"
    total, scratch = len(layers) * (2 + (TRIES if settles else 0)), scratch_bytes(checkpoint)
    return Node(
        "allocate", call, ("grids",), memory=room_to_weigh(asked, checkpoint), total=total, writes=weights // 8,
        scratch=max(scratch, 2 * logits + weights) if settles else scratch, all_cores=True,
    )  # fmt: skip


def sweeping(asked: Request, checkpoint: Checkpoint, work: Path, wanted: list[Step]) -> list[Node]:
    """The nodes that tell what each of the artefacts would lose at which size."""
    place = asked.place(work, checkpoint)
    artefacts = [Artefact(step.target.name, step.variant) for step in wanted]
    arguments = {"place": place, "recipe": asked.recipe, "artefacts": artefacts, "text": asked.calibration}
    call, layers = Call("gemexport.engine.budget:sweep_widths", arguments), checkpoint.architecture.layers
    node = Node(
        "sweep", call, ("grids",), memory=room_to_weigh(asked, checkpoint), total=2 * len(layers),
        scratch=scratch_bytes(checkpoint), all_cores=True,
    )  # fmt: skip
    return [*graph(asked, checkpoint, work, []), node]


def rounding(asked: Request, checkpoint: Checkpoint, place: Place) -> Node:
    """The node that chooses the codes of plain linears; with none it has no work."""
    arguments = {"place": place, "recipe": asked.recipe, "text": asked.calibration}
    call, model = Call("gemexport.engine.rounding:round_linears", arguments), checkpoint.model
    shapes = [model.specs[name].shape for name in rounded(model)]
    weights = sum(map(math.prod, shapes))
    before = "allocate" if place.allocated else "grids"
    return Node(
        "round", call, (before,), memory=room_to_round(asked, checkpoint), total=weights, writes=weights // 2,
        scratch=weights // 2, all_cores=True, idle=lambda outcomes: not candidates(grid_index(outcomes), model),
    )  # fmt: skip


def room_to_round(asked: Request, checkpoint: Checkpoint) -> int:
    """What choosing codes takes."""
    model, found = checkpoint.model, []
    for name in rounded(model):
        scheme = asked.recipe.scheme(name)
        if scheme is not None and (name != head(model) or scheme.bits < ENOUGH):
            found.append((model.specs[name].shape, scheme.group_size))
    if not found:
        return 0  # the node has no work then
    widest = max(shape[-1] for shape, _ in found)
    return rounding_memory(
        checkpoint, widest, max(math.prod(shape) for shape, _ in found), min(block for _, block in found)
    )


def room_to_weigh(asked: Request, checkpoint: Checkpoint) -> int:
    """What it takes to tell what widths cost."""
    model = checkpoint.model
    return sensitivity_memory(checkpoint, asked.tokens, max(model.specs[name].shape[-1] for name in rounded(model)))


def grid_index(outcomes: Mapping[str, Outcome]) -> GridIndex:
    """The grids that formats are made of: as they were found, or in the widths that were chosen."""
    chosen: Allocated | None = outcomes["allocate"].value if "allocate" in outcomes else None
    index: GridIndex = outcomes["grids"].value if chosen is None else chosen.index
    return index


def gridded(asked: Request, place: Place) -> str:
    """The node after which every tensor has its grid."""
    return (
        "round" if rounds(asked.recipe, asked.compression is not None) else "allocate" if place.allocated else "grids"
    )


def codecs(checkpoint: Checkpoint, place: Place, wanted: list[Step]) -> list[Node]:
    """The nodes that fit vector codecs to the per-layer embeddings."""
    nodes = []
    for codec in dict.fromkeys(step.codec for step in wanted if step.codec is not None):
        call = Call("gemexport.engine.steps:fit_codec", {"place": replace(place, codec=codec)})
        coded = _per_layer_weights(checkpoint)
        codes = coded * codec.codebooks * codec.bits // (8 * codec.vector)
        fitting = search_memory(checkpoint)
        nodes.append(
            Node(f"codec {codec}", call, ("grids",), memory=fitting, total=coded, writes=codes, all_cores=True)
        )
    return nodes


def export(asked: Request, checkpoint: Checkpoint, place: Place, step: Step, before: Sequence[Step]) -> Node:
    """The node that writes an artefact, after those of the steps `before` it."""
    own, options = replace(place, codec=step.codec), asked.options.get(step.target.name, {})
    needs: tuple[str, ...] = (gridded(asked, place), *(() if step.codec is None else (f"codec {step.codec}",)))
    if measures(asked, step):
        options = {**options, "ranges": ranges_file(own)}
        needs = (*needs, calibration_name(step.codec))
    arguments = {
        "place": own, "target": step.target.name, "variant": step.variant, "path": step.path, "options": options,
    }  # fmt: skip
    writes, scratch = replaced(artifact_bytes(checkpoint.tensors, step.variant), step.path)
    memory = export_memory(checkpoint, step.target.name, [earlier.target.name for earlier in before])
    return Node(
        step.export_node, Call("gemexport.engine.steps:export", arguments), needs, memory=memory,
        total=checkpoint.plain_nbytes(), writes=writes, scratch=scratch, light=True,
    )  # fmt: skip


def measures(asked: Request, step: Step) -> bool:
    """Whether an artefact waits for activations to be measured."""
    return step.variant in step.target.calibrated and not OWN & asked.options.get(step.target.name, {}).keys()


def calibration_name(codec: Codec | None) -> str:
    """The node that measures activations."""
    return "calibrate" if codec is None else f"calibrate {codec}"


def calibrations(
    asked: Request, checkpoint: Checkpoint, place: Place, recipe: Recipe, wanted: list[Step]
) -> list[Node]:
    """The nodes that measure activations: one for all variants that want it, with each codec."""
    nodes = []
    for codec in dict.fromkeys(step.codec for step in wanted if measures(asked, step)):
        options = asked.options.get("onnx", {})
        arguments = {
            "place": replace(place, codec=codec), "recipe": recipe, "text": asked.calibration,
            "sizes": {key: options[key] for key in ("context", "prefill") if key in options},
        }  # fmt: skip
        call = Call("gemexport.engine.calibration:calibrate", arguments)
        needs = (gridded(asked, place), *(() if codec is None else (f"codec {codec}",)))
        room = logits_memory(checkpoint, asked.tokens)
        nodes.append(Node(calibration_name(codec), call, needs, memory=room, total=checkpoint.plain_nbytes()))
    return nodes


def _per_layer_weights(checkpoint: Checkpoint) -> int:
    layers = checkpoint.architecture.per_layer
    return 0 if layers is None else layers.vocab_size * layers.dim * len(checkpoint.architecture.layers)


def judgement(asked: Request, checkpoint: Checkpoint, work: Path, step: Step) -> list[Node]:
    """The DAG that judges an artefact that lies there already: nothing is computed before it is known to be one."""
    place = asked.place(work, checkpoint)
    call = Call(
        "gemexport.judge.opening:open_artifact", {"place": place, "target": step.target.name, "path": step.path}
    )
    opened = Node(step.open_node, call, memory=export_memory(checkpoint, step.target.name), light=True)
    found = [*graph(asked, checkpoint, work, []), *validators(asked, checkpoint, place, [(step, "grids")])]
    return [opened, *(node if node.needs else replace(node, needs=(opened.name,)) for node in found)]


def validators(asked: Request, checkpoint: Checkpoint, place: Place, wanted: list[tuple[Step, str]]) -> list[Node]:
    """The reference, and the validators of artefacts, each with the node that it waits for."""
    weights, logits = checkpoint.architecture.parameters(), 4 * asked.tokens * checkpoint.architecture.vocab_size
    memory, matrices = reference_memory(checkpoint, asked.tokens), multiplied(checkpoint)
    rooms = {step: validator_room(checkpoint, asked.tokens, step) for step, _ in wanted}
    affordable = {step for step, room in rooms.items() if max(room.least, memory) <= asked.memory - COMMAND}
    nodes = []
    if affordable:
        # Blocks of a GGUF file go back as they are, so any variant may be computed as K-quants are.
        own = bool(checkpoint.files)
        noises = {noise for step in affordable for noise in step.target.noises_of("" if own else step.variant)}
        noises.add("bf16")  # which tells what of the loss is noise
        call = Call("gemexport.engine.steps:reference", {"place": place, "noises": tuple(sorted(noises))})
        positions = asked.tokens * (len(checkpoint.architecture.layers) + 1)
        total, writes = (
            positions * (1 + len(played_of(noises, checkpoint))),
            logits * (2 if checkpoint.activations else 1),
        )
        noisy = len(noises) * logits  # all of them go through a layer together
        nodes.append(Node("reference", call, memory=memory, total=total, writes=writes, scratch=noisy, all_cores=True))
    for step, before in wanted:
        runs, frugal = step in affordable, rooms[step].most > asked.memory - COMMAND
        arguments = {
            "place": replace(place, codec=step.codec), "target": step.target.name, "path": step.path,
            "run_logits": runs, "asked": _asked(asked, step) if before == step.export_node else None, "frugal": frugal,
        }  # fmt: skip
        # The reference's logits with the weights read back stay, those of all programs until they are compared.
        programs = len(step.target.arithmetics) + len(step.target.second_runtimes)
        taken = max(memory, rooms[step].least if frugal else rooms[step].most)
        call = Call("gemexport.judge.validation:validate", arguments)
        nodes.append(
            Node(
                step.validate_node, call,
                (before, *(("reference",) if runs else ())), memory=taken if runs else judging_memory(checkpoint),
                total=weights * (1 + len(step.target.arithmetics)), writes=logits if runs else 0,
                scratch=programs * logits + step.target.copies * matrices if runs else 0,
                without={"reference": partial(_without_logits, call)} if runs else {},
            )
        )  # fmt: skip
    return nodes


def _without_logits(call: Call, reference: Outcome) -> Call:
    """A validator after a reference that ended so: it judges what can be judged without."""
    ending = reference.failure or str(reference.error)
    return Call(call.function, {**call.arguments, "run_logits": False, "failed": ending})


def _asked(asked: Request, step: Step) -> Asked:
    """What the exporter of an artefact is asked for."""
    return Asked(step.variant, asked.options.get(step.target.name, {}))
