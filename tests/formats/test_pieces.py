"""Tensors made of rows of others read as these do, wherever a slice begins and ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemexport.formats.gemma.architecture import TensorSpec
from gemexport.formats.gemma.roles import Role
from gemexport.formats.gemma.stacks import apart, by_expert, put, switched, together
from gemexport.formats.pieces import Piece, Pieces, whole
from gemexport.formats.tensor import ArrayTensor, Grid, evaluate, row_count

EXPERTS, INNER, WIDTH = 5, 6, 64
SPECS = {
    spec.name: spec
    for spec in (
        TensorSpec("model.layers.3.experts.gate_up_proj", (EXPERTS, 2 * INNER, WIDTH), Role.EXPERT_GATE_UP, 3),
        TensorSpec("model.layers.3.experts.down_proj", (EXPERTS, WIDTH, INNER), Role.EXPERT_DOWN, 3),
        TensorSpec("model.layers.3.mlp.up_proj.weight", (INNER, WIDTH), Role.UP, 3),
    )
}


def tensor(name: str, shape: tuple[int, ...], kind: str = "symmetric", block: int | None = None) -> ArrayTensor:
    stream = np.random.default_rng(len(name))
    block = block or shape[-1]
    low = -8 if kind == "symmetric" else 0
    codes = stream.integers(low, low + 16, shape).astype(np.int8 if low else np.uint8)
    scales = (stream.integers(1, 100, (*shape[:-1], shape[-1] // block)) / 64).astype(np.float32)
    shifts = None if low else stream.integers(0, 16, scales.shape).astype(np.float32)
    grid = Grid(4, block, "bf16", True, "symmetric" if low else "zero-point")
    flat = (array if array is None else array.reshape(-1, array.shape[-1]) for array in (codes, scales, shifts))
    values = evaluate(grid, *flat).astype(np.float32).reshape(shape)
    return ArrayTensor(name, values, "f32", codes, scales, grid, shifts)


@pytest.mark.parametrize("layout", [together, switched, by_expert])
@pytest.mark.parametrize("kind", ["symmetric", "zero-point"])
def test_what_is_taken_apart_is_put_together_again(layout, kind: str) -> None:
    tensors = {name: tensor(name, spec.shape, kind) for name, spec in SPECS.items()}
    parts = apart(tensors, SPECS, layout)
    assert {name: part.name for name, part in parts.items()} == {name: name for name in parts}
    for name, spec in SPECS.items():
        found = put(spec, [(part, parts[part.name]) for part in layout(spec)])
        source = tensors[name]
        assert (found.name, found.shape, found.grid) == (name, spec.shape, source.grid)
        wanted, rows = (each.rows(0, row_count(spec.shape)) for each in (source, found))
        assert np.array_equal(rows.values, wanted.values)
        assert np.array_equal(rows.grid()[0], wanted.grid()[0])
        assert np.array_equal(rows.grid()[1], wanted.grid()[1])
        assert kind == "symmetric" or np.array_equal(rows.shifted()[2], wanted.shifted()[2])


def test_the_parts_are_called_as_their_programs_call_them() -> None:
    gate_up, down, other = SPECS.values()
    stem = "model.layers.3.experts"
    assert [part.name for part in switched(gate_up)] == [
        f"{stem}.switch_glu.gate_proj.weight",
        f"{stem}.switch_glu.up_proj.weight",
    ]
    assert [(part.name, part.shape) for part in switched(down)] == [
        (f"{stem}.switch_glu.down_proj.weight", (EXPERTS, WIDTH, INNER))
    ]
    assert [part.name for part in by_expert(gate_up)][:3] == [
        f"{stem}.0.gate_proj.weight",
        f"{stem}.0.up_proj.weight",
        f"{stem}.1.gate_proj.weight",
    ]
    assert [(part.name, part.shape) for part in by_expert(down)][-1] == (f"{stem}.4.down_proj.weight", (WIDTH, INNER))
    assert [part.name for part in by_expert(other)] == [other.name]


@given(st.data())
def test_any_slice_is_that_of_the_rows_in_a_row(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    base = tensor("base", (40, 32))
    starts = [data.draw(st.integers(0, 40 - size)) for size in sizes]
    pieces = Pieces("pieces", (sum(sizes), 32), [Piece(base, at, at + n) for at, n in zip(starts, sizes, strict=True)])
    wanted = np.concatenate([base.numpy()[at : at + n] for at, n in zip(starts, sizes, strict=True)])
    start = data.draw(st.integers(0, sum(sizes) - 1))
    stop = data.draw(st.integers(start + 1, sum(sizes)))
    rows = pieces.rows(start, stop)
    assert np.array_equal(rows.values, wanted[start:stop])
    assert np.array_equal(rows.grid()[0] * np.repeat(rows.grid()[1], 32, 1), wanted[start:stop])


def test_pieces_on_different_grids_are_on_none() -> None:
    one, other = tensor("a", (4, 64), block=32), tensor("b", (4, 64), block=64)
    found = Pieces("both", (8, 64), [whole(one), whole(other)])
    assert found.grid is None
    assert found.rows(2, 6).codes is None
    assert np.array_equal(found.rows(2, 6).values, np.concatenate([one.numpy()[2:], other.numpy()[:2]]))


def test_rows_that_do_not_make_the_shape_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="do not make"):
        Pieces("short", (3, 2, 64), [whole(tensor("a", (4, 64)))])
