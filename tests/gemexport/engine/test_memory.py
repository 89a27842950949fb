"""Estimates of what steps take, where what they are made of can be looked at."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemexport.engine.dag import room_to_round
from gemexport.engine.memory import made_of_rows, validator_room
from gemexport.formats.activations import Activations
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.grids.feedback import Inputs, fit
from gemexport.formats.grids.recipe import RECIPES, Scheme
from gemexport.request import request, steps


@pytest.mark.parametrize(("width", "block"), [(1024, 16), (640, 32), (1024, 128)])
def test_what_is_made_of_rows_as_their_codes_are_chosen(width: int, block: int) -> None:
    """NumPy tells tracemalloc what it allocates."""
    random = np.random.default_rng(0)
    x, values = (random.standard_normal((rows, width)).astype(np.float32) for rows in (2 * width, 256))
    inputs = Inputs.of(x.T @ x)
    fit(values[:8], inputs, block, 4)  # compiles
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        fit(values, inputs, block, 4)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (peak - before) / values.nbytes == pytest.approx(made_of_rows(width, block), rel=0.2)


def test_room_to_round_is_of_what_is_rounded(tiny_gemma3: Path) -> None:
    """A head of eight bits is not; smaller blocks have more products."""
    asked = request(model=tiny_gemma3)
    checkpoint = asked.checkpoint()

    def room(**changes: object) -> int:
        return room_to_round(replace(asked, recipe=RECIPES["default"].model_copy(update=changes)), checkpoint)

    assert room() < room(embedding=Scheme())
    assert room() < room(linear=Scheme(group_size=2))


def test_a_second_program_is_counted_where_it_is_going_to_judge(
    tiny_gemma4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO computes in f32: neither where it is not installed, nor with static scales of activations."""
    asked = request(model=tiny_gemma4, formats=["onnx"], variants={"onnx": ("npu",)})
    checkpoint = asked.checkpoint()
    (step,) = steps(asked, checkpoint)

    def most(installed: bool, checkpoint: Checkpoint) -> int:
        monkeypatch.setattr("gemexport.registry._installed", lambda name: installed or name != "openvino")
        return validator_room(checkpoint, 512, step).most

    static = replace(checkpoint, activations=Activations({}, {}))
    assert most(True, checkpoint) > most(False, checkpoint) == most(True, static)
