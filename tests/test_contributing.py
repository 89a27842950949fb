"""CONTRIBUTING.md shows a whole new format; what it shows is run here as it stands there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer
from samples import with_grids

import gemexport
from gemexport import cli, demo, registry
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.gemma import families
from gemexport.formats.storage.safetensors import read_folder
from gemexport.registry import Setting, Target
from gemexport.request import Request, request
from gemexport.validators.checks.weights import compare

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, re.DOTALL))


@pytest.fixture
def target() -> Iterator[Target]:
    """The format of CONTRIBUTING.md, its modules importable under the names that they would have."""
    made = []
    for path in ("formats/rows8.py", "exporters/rows8.py", "validators/runtimes/rows8.py"):
        module = ModuleType("gemexport." + path.removesuffix(".py").replace("/", "."))
        sys.modules[module.__name__] = module
        made.append(module.__name__)
        exec(compile(BLOCKS[path], f"CONTRIBUTING.md {path}", "exec"), module.__dict__)
    yield eval(BLOCKS["gemexport/registry.py"], vars(registry))
    for name in made:
        del sys.modules[name]


def test_the_new_format_passes_what_every_format_is_judged_by(
    target: Target, tiny_gemma4: Path, tmp_path: Path
) -> None:
    checkpoint = with_grids(tiny_gemma4, tmp_path / "grids")
    path = target.path(tmp_path, checkpoint.name, target.variants[0])
    done: list[int] = []
    exported = target.exporter().export(checkpoint, path, variant=target.variants[0], progress=done.append)
    assert exported.path == path
    assert sum(done) == checkpoint.nbytes()
    found = compare(checkpoint.tensors, target.reader().tensors(path))
    assert found.missing == found.unexpected == ()
    assert all(tensor.exact_fraction == 1.0 for tensor in found.tensors)
    assert any(tensor.grid for tensor in found.tensors)

    from gemexport.validators.reference import reference

    tokens = list(range(5, 25))
    read_back = target.reader().tensors(path)
    expected = reference(checkpoint.text_config, read_back, 2).logits(tokens)
    runtime = target.adapter().load(path, threads=2, context=32)
    assert np.array_equal(runtime.logits(tokens), expected)
    assert len(runtime.greedy(tokens, 3)) == 3
    runtime.close()


def test_it_has_a_command_with_its_settings(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", typer.Typer())
    asked: list[Request] = []
    monkeypatch.setattr(cli, "_run", lambda _, **given: asked.append(request(**given)))
    monkeypatch.setitem(registry.TARGETS, target.name, target)
    settings = (Setting("block", "Weights a scale.", int), Setting("tied", "One table.", bool))
    cli._add_format(replace(target, settings=settings))
    cli.app.command("other")(lambda: None)  # of a single command typer makes the program itself
    cli.app(["rows8", "model", "--block", "16", "--tokens", "64"], standalone_mode=False)
    assert asked[0].variants == {"rows8": ("int8",)}
    assert asked[0].options == {"rows8": {"block": 16}}
    assert (asked[0].model, asked[0].tokens, asked[0].validate) == (Path("model"), 64, True)


def test_an_error_leaves_nothing_behind(target: Target, tiny_gemma3: Path, tmp_path: Path) -> None:
    checkpoint = replace(open_checkpoint(tiny_gemma3), text_config={"not": {"json"}})
    with pytest.raises(TypeError):
        target.exporter().export(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_file_that_contributing_names_exists() -> None:
    root = Path(__file__).parents[1]
    for name in re.findall(r"`((?:gemexport|exporters|formats|validators|tests)/[\w/.]+)`", TEXT):
        assert name in BLOCKS or "NAME" in name or (root / name).exists(), name


FAMILY = "formats/gemma/families/toy.py"
# What a checkpoint of the toy says, of what the demo's Gemma 4 with experts says.
RENAMED = {"num_experts": "experts", "top_k_experts": "experts_at_once", "moe_intermediate_size": "expert_size"}
NOT_SAID = ("enable_moe_block", "hidden_size_per_layer_input", "architectures")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of CONTRIBUTING.md's family, three layers; the family is known here and in processes of a run."""
    module = tmp_path / "modules" / "toy.py"
    module.parent.mkdir()
    module.write_text(BLOCKS[FAMILY], "utf-8")
    start = f"""
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("gemexport.formats.gemma.families.toy", {str(module)!r})
toy = module_from_spec(spec)
spec.loader.exec_module(toy)
from gemexport.formats.gemma.families import register
register(toy.Toy())
"""
    (module.parent / "sitecustomize.py").write_text(start, "utf-8")  # what Python imports first of all
    monkeypatch.setenv("PYTHONPATH", str(module.parent))
    monkeypatch.setattr(families, "FAMILIES", list(families.FAMILIES))
    exec(compile(start, "sitecustomize.py", "exec"), {})
    gemma4 = demo.config_json("gemma4", demo.SIZES["tiny"], experts=True)
    config = {RENAMED.get(key, key): value for key, value in gemma4.items() if key not in NOT_SAID}
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    config |= {"model_type": "toy", "num_hidden_layers": 3, "layer_types": layers}
    return demo.write(tmp_path / "toy", config)


def test_a_new_family_is_read_by_its_own_names(toy: Path, tmp_path: Path) -> None:
    stored = {name for name in read_folder(toy) if ".toys." in name or ".switch." in name}
    assert len(stored) == 3 * 5
    checkpoint = open_checkpoint(toy)
    assert checkpoint.model.family.name == "toy"
    assert checkpoint.architecture.experts is not None
    assert len(checkpoint.architecture.layers) == 3
    assert checkpoint.left_out == ()
    with_its_grids = with_grids(toy, tmp_path / "grids")
    experts = [item for name, item in with_its_grids.tensors.items() if len(item.shape) == 3]
    assert [item.grid is not None for item in experts] == [True] * 6


def test_the_entry_that_contributing_tells_is_the_one_there_and_the_new_family() -> None:
    source = (Path(__file__).parents[1] / "formats/gemma/families/__init__.py").read_text("utf-8")
    assert BLOCKS["formats/gemma/families/__init__.py"].replace(", Toy()", "") in source


@pytest.mark.slow
def test_every_default_artefact_of_a_new_family_passes(toy: Path, tmp_path: Path) -> None:
    report = gemexport.export(toy, tmp_path / "out", tokens=128)
    expected = [(name, variant) for name, target in registry.TARGETS.items() for variant in target.variants]
    assert [(item.format, item.variant) for item in report.artifacts] == expected
    for item in report.artifacts:
        broken = [(bound.metric, bound.value) for bound in item.bounds if not bound.held]
        assert (item.format, item.variant, item.status, item.reason, broken) == (
            item.format, item.variant, "pass", None, []
        )  # fmt: skip
        assert item.weights
        assert all(tensor.exact_fraction == 1 for tensor in item.weights.tensors if len(tensor.shape) > 1)
