"""A request is one value: what was said, checked, and the rest filled in."""

from __future__ import annotations

import importlib
import inspect
import os
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gemexport
from gemexport.compress import Compression
from gemexport.engine.dag import graph, judgement, rounding
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.grids.recipe import RECIPES
from gemexport.formats.storage.errors import InputError
from gemexport.registry import TARGETS
from gemexport.request import Request, Step, request, steps
from gemexport.run import compiling
from gemexport.shared.node import Call, Node


def test_what_was_not_said_is_filled_in(tiny_gemma3: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = request(model=str(tiny_gemma3), out=None, jobs=None)
    everything = {name: target.variants for name, target in TARGETS.items()}
    out = Path("tiny-gemma3-gemexport")
    assert asked == Request(model=tiny_gemma3, out=out, variants=everything, memory=asked.memory)
    assert asked.recipe == RECIPES["default"]
    assert asked.jobs == os.cpu_count()
    assert (asked.ple_codec, asked.compression) == ((None,), None)
    assert request(model=tiny_gemma3, adapter=tmp_path / "lora").out == Path("tiny-gemma3-lora-gemexport")
    assert request(model=tiny_gemma3, out=".").out == Path()


def test_it_is_a_value(tiny_gemma3: Path) -> None:
    asked = request(model=tiny_gemma3, variants={"gguf": ["Q8_0"]}, formats=["gguf"], memory=1 << 30)
    with pytest.raises(FrozenInstanceError):
        asked.jobs = 2  # type: ignore[misc]
    moved = replace(asked, out=Path("elsewhere"))
    assert (moved.out, moved.variants, moved.memory) == (Path("elsewhere"), {"gguf": ("Q8_0",)}, 1 << 30)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"tokens": "many"}, "tokens: Input should be a valid integer"),
        ({"colour": "red"}, "colour: Unexpected keyword argument"),
        ({"options": ["gguf"]}, "options: Input should be a valid dictionary"),
    ],
)
def test_what_is_no_request_is_one_line(said: dict[str, Any], message: str, tiny_gemma3: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        request(model=tiny_gemma3, **said)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 999), st.sampled_from([("", 1), ("kB", 10**3), ("MB", 10**6), ("GB", 10**9), ("GiB", 1 << 30)]))
def test_memory_is_a_size_with_its_unit(number: int, unit: tuple[str, int]) -> None:
    name, factor = unit
    for spelt in (f"{number}{name}", f" {number} {name.lower()} "):
        if name:
            assert request(model="m", memory=spelt).memory == number * factor
        else:
            with pytest.raises(InputError, match="write a unit, such as 8GB"):
                request(model="m", memory=spelt)
    assert request(model="m", memory=number * 10**6).memory == number * 10**6


def test_python_and_the_command_line_say_the_same_things() -> None:
    """All that makes a request can be said; formats to leave out are for those who do not see a list."""
    said = inspect.signature(gemexport.export).parameters.keys() - {"progress"}
    taken = inspect.signature(request).parameters.keys() | inspect.signature(Request).parameters.keys()
    assert said == taken - {"skip", "further", "compression"}


def every_node(model: Path, folder: Path) -> list[Node]:
    """The steps of a run that has all there are, and of one artefact judged."""
    asked = request(
        model=model, out=folder, ple_codec="none,aqlm:2x8", memory="1TB",
        variants={name: target.known_variants for name, target in TARGETS.items()},
    )  # fmt: skip
    asked = replace(asked, compression=Compression("rtn", Path("python")))  # whether it is installed or not
    checkpoint = open_checkpoint(model)  # nothing has compressed it
    step = Step(TARGETS["gguf"], "Q4_0", folder / "model.gguf")
    place = asked.place(folder, checkpoint)
    return [
        *graph(asked, checkpoint, folder, steps(asked, checkpoint)),
        *judgement(asked, checkpoint, folder, step),
        rounding(asked, checkpoint, place),  # where nothing else has rounded
        compiling(asked, checkpoint, place, step.path, folder, None),
    ]


def test_every_step_names_a_function_that_takes_what_it_is_given(tiny_gemma4: Path, tmp_path: Path) -> None:
    called = set()
    for node in every_node(tiny_gemma4, tmp_path):
        check(node.call)
        called.add(node.call.function.rpartition(":")[2])
    assert called == {
        "compress", "grids", "round_linears", "fit_codec", "calibrate", "export", "reference", "open_artifact",
        "validate", "compile_npu",
    }  # fmt: skip


@pytest.mark.parametrize(
    "call",
    [
        Call("gemexport.engine.steps:gird", {}),
        Call("gemexport.engine.step:grids", {}),
        Call("gemexport.engine.steps:grids", {"place": None}),
        Call("gemexport.engine.steps:grids", {"place": None, "recipe": None, "more": None}),
    ],
)
def test_a_mistyped_step_is_found(call: Call) -> None:
    with pytest.raises((AttributeError, ImportError, TypeError)):
        check(call)


def check(call: Call) -> None:
    """What a worker does with a call, but for calling it."""
    module, name = call.function.split(":")
    inspect.signature(getattr(importlib.import_module(module), name)).bind(**call.arguments, progress=print)
