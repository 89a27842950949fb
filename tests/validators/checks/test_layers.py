"""Where two models depart: the first layer that is off by more than the limit, in the order of the layers."""

from __future__ import annotations

import numpy as np

from gemexport.formats.tensor import Floats
from gemexport.validators.checks.layers import departure, in_order, relative_error

STREAM = np.random.default_rng(0)
LAYERS: list[Floats] = [STREAM.normal(size=(5, 8)).astype(np.float32) for _ in range(4)]


def off(index: int, by: float) -> list[Floats]:
    """The same layers, those from `index` on off by a share of their size."""
    return [layer * np.float32(1 + by * (i >= index)) for i, layer in enumerate(LAYERS)]


def test_the_same_values_depart_nowhere() -> None:
    assert departure(LAYERS, LAYERS, 0.0) is None
    assert departure(off(1, 1e-6), LAYERS, 1e-4) is None


def test_the_first_layer_that_is_off_is_named() -> None:
    first = departure(off(2, 0.1), LAYERS, 1e-4)
    assert first is not None
    assert (first.layer, first.name) == (1, "model.layers.1")
    assert abs(first.relative_error - 0.1) < 1e-6
    before = departure(off(0, 0.1), LAYERS, 1e-4)
    assert before is not None
    assert (before.layer, before.name) == (-1, "model.embed_tokens")


def test_what_is_no_number_departs() -> None:
    broken = [layer.copy() for layer in LAYERS]
    broken[3][0, 0] = np.nan
    first = departure(broken, LAYERS, 1e-4)
    assert first is not None
    assert (first.layer, first.relative_error) == (2, float("inf"))
    assert relative_error(broken[3], LAYERS[3]) == float("inf")


def test_values_are_ordered_by_the_norms_that_read_them() -> None:
    names = {f"model.layers.{i}.input_layernorm.weight": i for i in (2, 0, 1)}
    assert in_order({**names, "model.norm.weight": 3}) == [0, 1, 2, 3]
    assert in_order(names) == [], "without the last norm the last layer is not known"
    assert in_order({"model.norm.weight": 0}) == []
