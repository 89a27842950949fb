"""Which step waits for which, and what each may take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gemexport.engine.dag import graph, judgement
from gemexport.engine.memory import COMMAND, judging_memory, reference_memory, validator_room
from gemexport.engine.scheduler import in_order
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.registry import TARGETS
from gemexport.request import Step, request, steps
from gemexport.validators.runtimes.memory import sizes


@pytest.mark.parametrize("affordable", [True, False])
def test_an_artefact_that_lies_there_is_judged_as_one_of_a_run(
    affordable: bool, tiny_gemma3: Path, tmp_path: Path
) -> None:
    """It is opened first, and waits for the grids in place of its export; else its steps are those of a run."""
    memory = "1TB" if affordable else 1 << 20
    asked = request(model=tiny_gemma3, out=tmp_path, formats=["gguf"], memory=memory)
    checkpoint = asked.checkpoint()
    (step,) = steps(asked, checkpoint)
    ran = {node.name: node for node in graph(asked, checkpoint, tmp_path, [step])}
    judged = {node.name: node for node in judgement(asked, checkpoint, tmp_path, step)}
    assert judged.pop(step.open_node).needs == ()
    assert judged.keys() == ran.keys() - {step.export_node, "round"}  # as which codes were chosen is in it
    reference = ("reference",) if affordable else ()
    assert ran[step.validate_node].needs == (step.export_node, *reference)
    assert judged.pop(step.validate_node).needs == ("grids", *reference)
    for name, node in judged.items():
        assert node == replace(ran[name], needs=ran[name].needs or (step.open_node,))
    if affordable:
        assert judged["reference"].all_cores
        assert judged["reference"].memory == reference_memory(checkpoint, asked.tokens)


def test_every_graph_can_be_run(tiny_gemma4: Path, tmp_path: Path) -> None:
    everything = {name: target.known_variants for name, target in TARGETS.items()}
    asked = request(model=tiny_gemma4, out=tmp_path, variants=everything, ple_codec="none,aqlm:2x8")
    checkpoint = asked.checkpoint()
    nodes = graph(asked, checkpoint, tmp_path, steps(asked, checkpoint))
    order, ended = in_order(nodes), set[str]()
    needs = {node.name: set(node.needs) for node in nodes}
    while order.is_active():
        for name in order.get_ready():
            assert needs[name] <= ended
            ended.add(name)
            order.done(name)
    assert ended == needs.keys()


def test_logits_and_a_runtimes_copy_are_planned_for(tiny_gemma3: Path, tmp_path: Path) -> None:
    """llama.cpp is run twice, and maps the tensors as float32 from a file to compute in that."""
    asked = request(model=tiny_gemma3, out=tmp_path, memory="1TB", tokens=100)
    checkpoint = asked.checkpoint()
    logits = 4 * 100 * checkpoint.architecture.vocab_size
    weights = checkpoint.architecture.parameters()  # of which no table is only looked up
    for name, scratch in (("gguf", 2 * logits + 4 * weights), ("mlx", logits)):
        step = Step(TARGETS[name], "any", tmp_path / "artefact")
        nodes = {node.name: node for node in judgement(asked, checkpoint, tmp_path, step)}
        played = len({*step.target.noises_of("any"), "bf16"})
        assert (nodes["reference"].writes, nodes["reference"].scratch) == (logits, played * logits)
        assert nodes[step.validate_node].writes == logits
        assert nodes[step.validate_node].scratch == scratch


def test_each_program_is_given_what_it_needs_of_the_memory(tiny_gemma4: Path, tmp_path: Path) -> None:
    """As much as it likes where that is there, the least where only that is, and nothing runs where it is not."""
    asked = request(model=tiny_gemma4, out=tmp_path, formats=["onnx", "compressed-tensors"], tokens=100)
    checkpoint = asked.checkpoint()
    for step in steps(asked, checkpoint):
        room = validator_room(checkpoint, asked.tokens, step)
        for memory, runs, frugal in ((room.most, True, False), (room.least, True, True), (1 << 20, False, True)):
            given = replace(asked, memory=COMMAND + max(memory, reference_memory(checkpoint, 100) if runs else 0))
            nodes = {node.name: node for node in judgement(given, checkpoint, tmp_path, step)}
            arguments = nodes[step.validate_node].call.arguments
            assert arguments["run_logits"] == runs
            assert arguments["frugal"] == (frugal and given.memory < COMMAND + room.most)
            assert nodes[step.validate_node].memory <= max(given.memory, judging_memory(checkpoint))
            assert ("reference" in nodes) == runs


def test_what_is_looked_up_and_what_is_multiplied_make_up_a_model(tiny_gemma3: Path, tiny_gemma4: Path) -> None:
    for folder in (tiny_gemma3, tiny_gemma4):
        checkpoint = open_checkpoint(folder)
        found = sizes(checkpoint.model, 7, 0.5)
        assert found.matrices + found.tables == checkpoint.architecture.parameters()
        assert (found.tables > 0) == (checkpoint.architecture.per_layer is not None)
        assert found.logits == 7 * 4 * checkpoint.architecture.vocab_size
