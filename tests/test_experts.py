"""A mixture of experts through the formats: codes pass through unchanged, and come back as the checkpoint's tensors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from samples import with_grids

import gemexport
from gemexport import demo
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.gemma.names import role_of
from gemexport.formats.gemma.roles import Kind, Role
from gemexport.formats.tensor import row_count, slices
from gemexport.registry import TARGETS
from gemexport.validators.checks.weights import compare

WRITTEN = [
    ("gguf", "Q4_0"),
    ("gguf", "Q8_0"),
    ("gguf", "BF16"),
    ("mlx", "4bit"),
    ("mlx", "f32"),
    ("onnx", "int4"),
    ("onnx", "f32"),
    ("onnx", "npu"),
    ("coreml", "int4"),
    ("coreml", "f32"),
    ("compressed-tensors", "w4a16"),
    ("compressed-tensors", "bf16"),
]
READ = ["gguf", "mlx", "compressed-tensors"]  # artefacts that are checkpoints too


@pytest.fixture(scope="module")
def checkpoint(tiny_experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return with_grids(tiny_experts, tmp_path_factory.mktemp("grids") / "experts")


def export(checkpoint: Checkpoint, folder: Path, name: str, variant: str) -> Path:
    target = TARGETS[name]
    path = target.path(folder, checkpoint.name, variant)
    path.parent.mkdir(parents=True, exist_ok=True)
    done: list[int] = []
    target.exporter().export(checkpoint, path, variant=variant, progress=done.append)
    assert 0.99 * checkpoint.nbytes() < sum(done) <= checkpoint.nbytes()  # some count matrices alone
    return path


def test_the_experts_lie_on_the_lattice_and_the_router_does_not(checkpoint: Checkpoint) -> None:
    grids = {role_of(name): tensor.grid for name, tensor in checkpoint.tensors.items()}
    assert grids[Role.EXPERT_GATE_UP] == grids[Role.EXPERT_DOWN] == grids[Role.UP] is not None
    assert grids[Role.ROUTER] is None


@pytest.mark.parametrize(("name", "variant"), WRITTEN)
def test_every_weight_comes_back_exactly(name: str, variant: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = TARGETS[name].reader().tensors(export(checkpoint, tmp_path, name, variant))
    compared = compare(checkpoint.tensors, found)
    assert compared.missing == compared.unexpected == ()
    assert {item.name: item.exact_fraction for item in compared.tensors if item.exact_fraction < 1} == {}
    for tensor_name, tensor in checkpoint.tensors.items():
        role = role_of(tensor_name)
        assert role is not None
        assert found[tensor_name].shape == tensor.shape
        if role.kind is Kind.EXPERT and variant in TARGETS[name].variants:
            for start, stop in slices(tensor, 4096):  # slices that begin and end within an expert
                ours, theirs = tensor.rows(start, stop).grid()[0], found[tensor_name].rows(start, stop).grid()[0]
                assert np.array_equal(ours, theirs), tensor_name


# By how much logits of a runtime may differ from the reference's; llama.cpp looks GELU up in a table of f16.
RUN = [
    ("gguf", "F32", 0.05),
    ("mlx", "4bit", 1e-4),
    ("onnx", "int4", 1e-4),
    ("onnx", "npu", 1e-4),
    ("coreml", "int4", 0.01),
]


@pytest.mark.parametrize(("name", "variant", "near"), RUN, ids=[f"{name}-{variant}" for name, variant, _ in RUN])
def test_its_program_chooses_the_same_experts(
    name: str, variant: str, near: float, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from gemexport.validators.reference import reference

    path, tokens = export(checkpoint, tmp_path, name, variant), list(range(5, 45))
    expected = reference(checkpoint.text_config, TARGETS[name].reader().tensors(path), 1).logits(tokens)
    runtime = TARGETS[name].adapter().load(path, threads=1, context=64)
    try:
        found = runtime.logits(tokens)
    finally:
        runtime.close()
    if not isinstance(found, np.ndarray):  # logarithms of the likeliest tokens: the shares of all tokens sum to 1
        found, expected = (
            found.logprobs,
            np.take_along_axis(expected - np.logaddexp.reduce(expected, axis=1, keepdims=True), found.ids, axis=1),
        )
    assert np.abs(found - expected).max() < near


@pytest.mark.parametrize("name", READ)
def test_an_artefact_is_a_checkpoint_with_the_same_experts(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = open_checkpoint(export(checkpoint, tmp_path, name, TARGETS[name].variants[0]))
    assert source.architecture.experts == checkpoint.architecture.experts
    assert source.left_out == ()
    compared = compare(checkpoint.tensors, source.tensors)
    assert compared.missing == compared.unexpected == ()
    assert all(item.exact_fraction == 1 for item in compared.tensors)


def test_gguf_files_whose_experts_have_their_halves_apart_are_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from gemexport.formats.gguf.container import Writer, read

    path = export(checkpoint, tmp_path, "gguf", "Q4_0")
    whole = read(path)
    split = ("ffn_gate_exps", "ffn_up_exps")

    def names(name: str) -> list[str]:
        return [name.replace("ffn_gate_up_exps", half) for half in split] if "ffn_gate_up_exps" in name else [name]

    shapes = {}
    for name, item in whole.tensors.items():
        halved = (item.shape[0], item.shape[1] // 2, *item.shape[2:]) if len(names(name)) == 2 else item.shape
        shapes |= dict.fromkeys(names(name), halved)
    with Writer(tmp_path / "apart.gguf", whole.packed, shapes) as out:
        for name, item in whole.tensors.items():
            data = np.array(whole.rows(item, 0, row_count(item.shape)))
            parts = (
                [data] if len(names(name)) == 1 else data.reshape(item.shape[0], 2, -1, data.shape[1]).swapaxes(0, 1)
            )
            for own, part in zip(names(name), parts, strict=True):
                out.write(own, item.type, np.ascontiguousarray(part).reshape(-1, data.shape[1]))
    source = open_checkpoint(tmp_path / "apart.gguf")
    assert source.left_out == ()
    assert all(item.exact_fraction == 1 for item in compare(checkpoint.tensors, source.tensors).tensors)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Experts that lie on no lattice; the default recipe fits them to one."""
    folder = tmp_path_factory.mktemp("plain")
    return with_grids(demo.make(folder / "plain", size="tiny", experts=True, rule=None), folder / "grids")


@pytest.mark.parametrize(("name", "variant"), WRITTEN)
def test_codes_that_were_fitted_to_plain_experts_are_what_is_written(
    name: str, variant: str, plain: Checkpoint, tmp_path: Path
) -> None:
    found = TARGETS[name].reader().tensors(export(plain, tmp_path, name, variant))
    assert list(compare(plain.tensors, found).missing) == []
    for tensor_name in (name for name in plain.tensors if role_of(name).kind is Kind.EXPERT):
        tensor, stored = plain.tensors[tensor_name], found[tensor_name]
        assert tensor.grid is not None
        assert not tensor.grid.lossless
        ours, theirs = (each.rows(0, row_count(tensor.shape)) for each in (tensor, stored))
        if variant in TARGETS[name].variants:
            assert np.array_equal(ours.grid()[0], theirs.grid()[0])
        elif variant in ("BF16", "bf16", "f32"):
            assert np.array_equal(ours.values, theirs.values)


def test_what_the_docs_tell_transformers_is_enough(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """With nothing of ours imported: a process of its own runs the page's code on a folder, and continues a prompt."""
    page = (Path(__file__).parents[1] / "docs" / "compressed-tensors.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    folder = export(checkpoint, tmp_path, "compressed-tensors", "w4a16")
    program = code.replace("FOLDER", str(folder))
    ran = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("The capital of France is")
    assert "newly initialized" not in ran.stderr
    assert "MISSING" not in ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "spelling"), [("max/7", "global_head_dim"), (None, "per_layer_config")])
def test_every_default_artefact_passes(rule: str | None, spelling: str, tmp_path: Path) -> None:
    model = demo.make(tmp_path / "model", size="tiny", experts=True, rule=rule, spelling=spelling, wrapped=True)
    accepted = None if rule else 100.0  # what 4 bits cost random weights is not asked here
    report = gemexport.export(model, tmp_path / "out", tokens=128, max_kld=accepted)
    expected = [(name, variant) for name, target in TARGETS.items() for variant in target.variants]
    found = [(item.format, item.variant, item.status, item.reason) for item in report.artifacts]
    assert found == [(*one, "pass", None) for one in expected]
