"""Every kind of grid into GGUF's block types: the same codes and scales come back, or a note says why not."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import random_tensor, with_grids

from gemexport import demo
from gemexport.exporters import gguf as exporter
from gemexport.exporters.fitting import Container
from gemexport.formats import gguf
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.gguf.container import read
from gemexport.formats.gguf.parts import read_parts
from gemexport.formats.tensor import ArrayTensor, Kind, evaluate, expand
from gemexport.validators.checks.weights import compare

NAME, STORED = "model.embed_tokens.weight", "token_embd.weight"
ROWS = 512  # of the tiny model's embedding


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    model = tmp_path_factory.mktemp("plain") / "model"
    return open_checkpoint(demo.make(model, family="gemma3", size="tiny", rule=None))


def tensor_of(kind: Kind, bits: int, block: int, width: int, seed: int) -> ArrayTensor:
    return random_tensor((ROWS, width), name=NAME, kind=kind, bits=bits, block=block, seed=seed)


def export(checkpoint: Checkpoint, folder: Path, tensor: ArrayTensor) -> tuple[Path, list[str]]:
    changed = replace(checkpoint, tensors={**checkpoint.tensors, NAME: tensor})
    result = exporter.export(changed, folder / "model.gguf")
    return result.path, [note for note in result.notes if note.startswith(NAME)]


kinds = st.one_of(
    st.tuples(st.just("symmetric"), st.integers(2, 8)),
    st.tuples(st.sampled_from(["affine", "zero-point"]), st.integers(2, 8)),
    st.just(("codebook", 4)),
)
layouts = st.sampled_from([(16, 96), (32, 96), (32, 80), (64, 192), (96, 96), (256, 256), (512, 512), (24, 48)])


@given(kinds, layouts.filter(lambda pair: pair[1] % pair[0] == 0), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_a_grid_comes_back_as_it_was_or_is_refused_by_name(
    plain: Checkpoint, kind: tuple[Kind, int], layout: tuple[int, int], seed: int
) -> None:
    tensor = tensor_of(*kind, *layout, seed)
    assert tensor.grid is not None
    answer = exporter.container(tensor.grid, layout[1], "Q4_0")
    with tempfile.TemporaryDirectory() as folder:
        path, notes = export(plain, Path(folder), tensor)
        stored = gguf.tensors(path)[NAME]
        found = stored.rows(0, ROWS)
        if not isinstance(answer, Container):
            assert notes == [f"{NAME} is written without its grid: {answer}"]
            assert np.array_equal(found.values, tensor.numpy())
            return
        assert notes == []
        assert read(path).tensors[STORED].type.name == answer.name
        assert stored.grid is not None
        expected = tensor.rows(0, ROWS)
        assert np.array_equal(found.codes, expected.codes)
        assert np.array_equal(expand(found.scales, stored.grid.block), expand(expected.scales, layout[0]))
        exact = evaluate(stored.grid, found.codes, found.scales, found.shifts)
        assert np.array_equal(exact, evaluate(tensor.grid, expected.codes, expected.scales, expected.shifts))


@pytest.mark.parametrize(
    ("kind", "bits", "layout", "name"),
    [
        ("symmetric", 2, (512, 512), "TQ2_0"),
        ("symmetric", 2, (32, 512), "Q4_0"),
        ("symmetric", 2, (96, 96), "Q4_0"),
        ("symmetric", 3, (32, 96), "Q4_0"),
        ("symmetric", 5, (32, 96), "Q5_0"),
        ("symmetric", 6, (32, 96), "Q8_0"),
        ("affine", 2, (64, 192), "Q4_1"),
        ("zero-point", 4, (96, 96), "Q4_1"),
        ("affine", 5, (32, 96), "Q5_1"),
        ("codebook", 4, (32, 96), "MXFP4"),
    ],
)
def test_the_smallest_type_that_holds_the_codes(kind: Kind, bits: int, layout: tuple[int, int], name: str) -> None:
    grid = tensor_of(kind, bits, *layout, seed=0).grid
    assert grid is not None
    answer = exporter.container(grid, layout[1], "Q4_0")
    assert isinstance(answer, Container)
    assert answer.name == name


@pytest.mark.parametrize("kind", ["symmetric", "affine", "zero-point"])
def test_scales_that_f16_lacks_are_rounded_and_the_codes_stay(kind: Kind, plain: Checkpoint, tmp_path: Path) -> None:
    """As GPTQ's f32 scales are: the validator sees the same codes on rounded scales and biases."""
    base = tensor_of(kind, 4, 32, 96, seed=1)
    rows = base.rows(0, ROWS)
    scales = rows.scales * np.float32(1 + 2.0**-20)
    grid = replace(base.grid, scale_dtype="f32")
    values = evaluate(grid, rows.codes, scales, rows.shifts).astype(np.float32)
    tensor = ArrayTensor(NAME, values, "f32", rows.codes, scales, grid, rows.shifts)
    path, notes = export(plain, tmp_path, tensor)
    assert notes == []
    (judged,) = compare({NAME: tensor}, gguf.tensors(path)).tensors
    assert judged.scale_rounded
    assert judged.exact < judged.compared
    assert judged.max_relative_error < 2.0**-10


def test_fp4_on_other_scales_than_powers_of_two_is_written_plain(plain: Checkpoint, tmp_path: Path) -> None:
    base = tensor_of("codebook", 4, 32, 96, seed=2)
    rows = base.rows(0, ROWS)
    scales = rows.scales.copy()
    scales[400, 1] *= 1.5
    values = evaluate(base.grid, rows.codes, scales).astype(np.float32)
    tensor = ArrayTensor(NAME, values, "f32", rows.codes, scales, base.grid)
    path, notes = export(plain, tmp_path, tensor)
    assert notes == [f"{NAME} is stored as F32: a scale is no power of two"]
    assert np.array_equal(gguf.tensors(path)[NAME].numpy(), values)


def test_blocks_of_a_gguf_file_go_back_byte_for_byte(mixed_gguf: Path, tmp_path: Path) -> None:
    """All types with codes, K-quants among them; what has none is compressed as the recipe says."""
    checkpoint = open_checkpoint(mixed_gguf, tmp_path / "scratch")
    path = exporter.export(with_grids(checkpoint, tmp_path / "grids"), tmp_path / "back.gguf").path
    before, after = read_parts(mixed_gguf), read_parts(path)
    assert before.stored.keys() == after.stored.keys()
    kept = set()
    for name, (container, stored) in before.stored.items():
        other, found = after.stored[name]
        count = stored.nbytes // stored.row_bytes
        if found.type == stored.type:
            kept.add(found.type)
            assert np.array_equal(container.rows(stored, 0, count), other.rows(found, 0, count)), name
        else:
            assert stored.type in (Type.TQ1_0, Type.F16)
    assert {kind.name for kind in kept} >= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "TQ2_0", "Q4_1", "F32"}


def test_other_variants_take_blocks_apart(mixed_gguf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(mixed_gguf, tmp_path / "scratch")
    path = exporter.export(checkpoint, tmp_path / "wide.gguf", variant="F32").path
    for name, tensor in gguf.tensors(path).items():
        assert tensor.dtype == "f32"
        assert np.array_equal(tensor.numpy(), checkpoint.tensors[name].numpy())
