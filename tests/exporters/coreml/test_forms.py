"""Every kind of grid through a Core ML package: codes and scales come back, and the program computes with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemexport.exporters import coreml
from gemexport.exporters.coreml.forms import code_type, form, held, split
from gemexport.exporters.fitting import Container
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.coreml import BIASES, constants, stored_name, tensors
from gemexport.formats.coreml.package import open_package
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import (
    ArrayTensor,
    Codes,
    DType,
    Floats,
    Grid,
    Kind,
    Tensor,
    evaluate,
    on_grid,
    round_to,
)
from gemexport.validators.checks.divergence import Divergence
from gemexport.validators.reference import reference
from gemexport.validators.runtimes.coreml import load

ct = pytest.importorskip("coremltools")

KINDS: tuple[Kind, ...] = ("symmetric", "zero-point", "affine", "codebook")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NAME = "model.layers.1.mlp.up_proj.weight"


def gridded(
    values: Floats, kind: Kind, bits: int, block: int, dtype: DType = "bf16", levels: tuple[float, ...] = ()
) -> ArrayTensor:
    """A tensor near `values` on a grid of the kind, its scales and biases rounded to `dtype`."""
    blocks = values.reshape(values.shape[0], -1, block)
    low, high, top = blocks.min(-1), blocks.max(-1), float((1 << bits) - 1)
    shifts: Floats | None = None
    if kind in ("symmetric", "codebook"):
        largest = max(map(abs, levels)) if levels else (1 << (bits - 1)) - 0.5
        scales = round_to((np.abs(blocks).max(-1) / largest).astype(np.float32), dtype)
        units = blocks / np.where(scales == 0, 1, scales)[..., None]
        if kind == "codebook":
            codes: Codes = np.abs(units[..., None] - np.asarray(levels)).argmin(-1).astype(np.uint8)
        else:
            codes = np.clip(np.rint(units), -(1 << (bits - 1)), (1 << (bits - 1)) - 1).astype(np.int8)
    else:
        scales = round_to(((high - low) / top).astype(np.float32), dtype)
        safe = np.where(scales == 0, 1, scales)
        biases = round_to(low, dtype)
        shifts = biases if kind == "affine" else np.clip(np.rint(-low / safe), 0, top).astype(np.float32)
        offset = -biases / safe if kind == "affine" else shifts
        codes = np.clip(np.rint(blocks / safe[..., None] + offset[..., None]), 0, top).astype(np.uint8)
    codes = codes.reshape(values.shape)
    return tensor_of(Grid(bits, block, dtype, True, kind, levels), codes, scales, shifts)


def tensor_of(grid: Grid, codes: Codes, scales: Floats, shifts: Floats | None = None, name: str = NAME) -> ArrayTensor:
    return ArrayTensor(name, on_grid(grid, codes, scales, shifts).values, "f32", codes, scales, grid, shifts)


def written(tensor: Tensor, folder: Path) -> Path:
    """A package whose only matrix is `tensor`, multiplied with its input."""
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    from gemexport.exporters.coreml.constants import matrix
    from gemexport.exporters.coreml.package import write_package
    from gemexport.exporters.coreml.weights import Sources

    sources = Sources("int4", "checkpoint", lambda _: None)
    with Function({"x": mb.placeholder((2, tensor.shape[1]), types.fp32)}, ct.target.iOS18) as function:
        kept = matrix(tensor, sources)
        results = [mb.linear(x=function.inputs["x"], weight=kept.weight, name="y")]
        if kept.biases is not None:
            results.append(mb.identity(x=kept.biases, name="z"))
        function.set_outputs(results)
    function.set_input_types((ct.TensorType("x", (2, tensor.shape[1]), np.float32),))
    program = Program()
    program.add_function("main", function)
    folder.mkdir()
    write_package(folder, program, {}, sources.write)
    return folder


@st.composite
def tensors_on_grids(draw: st.DrawFn) -> ArrayTensor:
    kind, bits = draw(st.sampled_from(KINDS)), draw(st.integers(2, 8))
    block, count = draw(st.sampled_from([(16, 3), (32, 2), (64, 1), (17, 1), (33, 2)]))
    rows = draw(st.integers(10, 21))
    dtype: DType = draw(st.sampled_from(["bf16", "f16", "f32"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    signed = kind == "symmetric"
    low = -(1 << (bits - 1)) if signed else 0
    codes = rng.integers(low, low + (1 << bits), (rows, block * count)).astype(np.int8 if signed else np.uint8)
    magnitude = np.exp2(rng.uniform(-20, 3, (rows, count)))
    scales = round_to((magnitude * rng.choice([-1, 1], (rows, count))).astype(np.float32), dtype)
    shifts = None
    if kind == "zero-point":
        # Some GPTQ files count zeros from 1, so that the largest is one more than a code can be.
        shifts = rng.integers(0, (1 << bits) + 1, (rows, count)).astype(np.float32)
    elif kind == "affine":
        shifts = round_to((scales * rng.uniform(-1.5 * (1 << bits), 3, (rows, count))).astype(np.float32), dtype)
    levels = tuple(rng.normal(size=1 << bits).astype(np.float32).tolist()) if kind == "codebook" else ()
    levels = E2M1 if levels and bits == 4 and draw(st.booleans()) else levels
    return tensor_of(Grid(bits, block, dtype, True, kind, levels), codes, scales, shifts)


@settings(max_examples=60, deadline=None)
@given(tensors_on_grids())
def test_what_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, tensor: ArrayTensor) -> None:
    path = written(tensor, tmp_path_factory.mktemp("package") / "a.mlpackage")
    (found,) = tensors(path).values()
    assert tensor.grid is not None
    assert found.grid is not None
    assert found.grid.block == tensor.grid.block
    wanted, rows = tensor.rows(3, 9), found.rows(3, 9)
    assert rows.scales is not None
    np.testing.assert_array_equal(rows.scales, wanted.scales)
    source = evaluate(tensor.grid, *wanted.grid(), wanted.shifts)
    np.testing.assert_array_equal(evaluate(found.grid, *rows.grid(), rows.shifts), source)
    np.testing.assert_array_equal(found.numpy(), tensor.numpy())
    if found.grid.kind == tensor.grid.kind:
        np.testing.assert_array_equal(rows.codes, wanted.codes)
        if wanted.shifts is not None:
            np.testing.assert_array_equal(rows.shifts, wanted.shifts)
    else:  # biases that are zero points, zero points in the middle
        assert KINDS.index(found.grid.kind) < KINDS.index(tensor.grid.kind) < 3
    stored = constants(open_package(path))
    computed = stored[stored_name(NAME)].numpy().astype(np.float64)
    if (rest := stored.get(stored_name(NAME) + BIASES)) is not None:
        computed += np.repeat(rest.numpy(), tensor.grid.block, axis=1)
    # Of every number's last bit, float32 products and sums may lose a few.
    largest = np.abs(tensor.numpy()).max(initial=0.0)
    np.testing.assert_allclose(computed, tensor.numpy(), rtol=1e-5, atol=1e-6 * largest)
    answer = coreml.container(tensor.grid, tensor.shape[1], "int4")
    assert isinstance(answer, Container)
    assert code_type(tensor.grid) in answer.name


def simple(grid: Grid, scale: float, shift: float | None = None) -> ArrayTensor:
    """Ten rows of a grid, every scale and every shift the same."""
    signed = grid.kind == "symmetric"
    codes = np.resize(np.arange(1 << grid.bits) - (1 << (grid.bits - 1) if signed else 0), (10, 64))
    shape = (10, 64 // grid.block)
    shifts = None if shift is None else np.full(shape, shift, np.float32)
    return tensor_of(grid, codes.astype(np.int8 if signed else np.uint8), np.full(shape, scale, np.float32), shifts)


@pytest.mark.parametrize(
    ("kind", "bits", "scale", "shift", "wanted"),
    [
        ("symmetric", 2, 0.5, None, ("uint2", "fp16", None, None)),
        ("symmetric", 3, 0.5, None, ("int4", "fp16", None, None)),
        ("symmetric", 4, 2.0**-18 * 1.5, None, ("int4", "fp16", None, None)),
        ("symmetric", 4, 2.0**-24 * 1.5, None, ("int4", "fp32", None, None)),  # float16 ends at 2**-24
        ("symmetric", 6, 1 / 3, None, ("int8", "fp32", None, None)),
        ("symmetric", 8, 1e5, None, ("int8", "fp32", None, None)),
        ("zero-point", 2, 0.5, 3, ("uint2", "fp16", "uint8", None)),
        ("zero-point", 4, 0.5, 3, ("uint4", "fp16", "uint4", None)),
        ("zero-point", 4, 0.5, 16, ("uint4", "fp16", "fp16", None)),
        ("zero-point", 5, 1 / 3, 31, ("uint8", "fp32", "uint8", None)),
        ("zero-point", 8, 0.5, 256, ("uint8", "fp16", "fp16", None)),
        ("affine", 4, 0.5, -2.5, ("uint4", "fp16", "uint4", None)),
        ("affine", 4, 0.5, -2.375, ("uint4", "fp16", "uint4", "fp16")),
        ("affine", 8, 0.5, -0.1, ("uint8", "fp16", "uint8", "fp32")),
    ],
)
def test_the_narrowest_types_that_hold_all_of_it(
    kind: Kind, bits: int, scale: float, shift: float | None, wanted: tuple[str | None, ...]
) -> None:
    kept = form(simple(Grid(bits, 32, "f32", True, kind), scale, shift))
    assert (kept.codes, kept.scales, kept.offsets, kept.biases) == wanted
    assert (kept.table is not None) == (kept.codes == "uint2")


def test_a_codebook_is_one_table_in_the_type_of_the_scales() -> None:
    kept = form(simple(Grid(4, 32, "f16", True, "codebook", E2M1), 0.25))
    assert kept.table is not None
    assert (kept.codes, kept.scales, kept.table.dtype, kept.table.tolist()) == ("uint4", "fp16", "f2", list(E2M1))
    kept = form(simple(Grid(4, 32, "f16", True, "codebook", (*E2M1[:-1], 1 / 3)), 0.25))
    assert kept.table is not None
    assert (kept.scales, kept.table.dtype) == ("fp32", "f4")
    five = form(simple(Grid(5, 32, "f16", True, "codebook", (*E2M1, *E2M1)), 0.25))
    assert five.table is not None
    assert (five.codes, five.table.shape) == ("uint6", (64,))
    answer = coreml.container(Grid(2, 32, "f16", True, "codebook", (0.1, 0, 1, 2)), 64, "int4")
    assert answer == "levels of its codebook are no f32 numbers"


def test_zero_points_take_from_biases_what_they_can() -> None:
    grid = Grid(4, 32, "f32", True, "affine")
    scales = np.array([[0.5, 0.5, -0.5, 0.0, 1.0, 1.0]], np.float32)
    biases = np.array([[-2.4, 3.0, 2.0, 1.0, -1e9, 1e-30]], np.float32)
    zeros, rest = split(grid, scales, biases)
    assert zeros.tolist() == [[5, 0, 4, 0, 0, 0]]  # 1e9 less 15 is no float32 number
    np.testing.assert_array_equal(rest, biases + scales.astype(np.float64) * zeros)


def test_what_a_type_holds() -> None:
    assert held(np.array([0, 15], np.float32), "uint4")
    assert not held(np.array([0, 16], np.float32), "uint4")
    assert not held(np.array([0.5], np.float32), "uint8")
    assert not held(np.array([np.nan], np.float32), "uint8")
    assert held(np.array([np.nan, 65504], np.float32), "fp16")
    assert not held(np.array([65536], np.float32), "fp16")


@pytest.fixture(scope="module")
def checkpoint(tiny_gemma4: Path) -> Checkpoint:
    """Every matrix on a grid, of all kinds and widths by turns."""
    found = open_checkpoint(tiny_gemma4)
    changed: dict[str, Tensor] = {}
    choices: list[tuple[Kind, int, int | None, DType]] = [
        ("affine", 4, 32, "bf16"), ("symmetric", 2, None, "f32"), ("zero-point", 4, 32, "f16"),
        ("codebook", 4, 32, "f16"), ("symmetric", 8, None, "f32"), ("affine", 8, 16, "f32"),
        ("zero-point", 2, 16, "f16"), ("symmetric", 4, None, "f32"), ("symmetric", 6, 16, "f32"),
    ]  # fmt: skip
    for i, (name, tensor) in enumerate(item for item in found.tensors.items() if len(item[1].shape) == 2):
        kind, bits, block, dtype = choices[i % len(choices)]
        levels = E2M1 if kind == "codebook" else ()
        made = gridded(tensor.numpy(), kind, bits, block or tensor.shape[1], dtype, levels)
        made.name = name
        changed[name] = made
    return dataclasses.replace(found, tensors=dict(found.tensors) | changed)


@pytest.fixture(scope="module")
def package(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "int4.mlpackage"
    result = coreml.export(checkpoint, path, context=64)
    assert result.notes == []
    return path


def test_a_model_on_all_kinds_of_grids_keeps_every_number(checkpoint: Checkpoint, package: Path) -> None:
    stored = tensors(package)
    assert set(stored) == set(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(round_to(stored[name].numpy(), tensor.dtype), tensor.numpy(), err_msg=name)
        if tensor.grid is not None:
            found = stored[name].grid
            assert found is not None
            assert found.block == tensor.grid.block


def test_the_program_computes_with_them(checkpoint: Checkpoint, package: Path) -> None:
    tokens = [2, *np.random.default_rng(5).integers(3, 200, 40).tolist()]
    wanted = reference(checkpoint.text_config, tensors(package), threads=1).logits(tokens)
    # Measured: 1.3e-11 in f32, 3.1e-5 in f16.
    for arithmetic, bound in (("f32", 1e-9), ("f16", 2e-4)):
        total = Divergence()
        total.add(wanted, load(package, threads=1, context=64, arithmetic=arithmetic).logits(tokens), tokens)
        assert total.kld_mean < bound


def test_weights_in_f32_are_read_by_matrices_in_f16(package: Path) -> None:
    """Scales that float16 cannot hold make a constant float32; linear takes it as it is, and computes in float16."""
    program = open_package(package)
    kinds = {output.name: output.type.tensorType.dataType for o in program.operations for output in o.outputs}
    mixed = [
        operation
        for operation in program.operations
        if operation.type == "linear"
        and kinds[operation.inputs["weight"].arguments[0].name] != kinds[operation.outputs[0].name]
    ]
    assert mixed
    ct.models.MLModel(str(package), skip_model_load=True)


def test_a_matrix_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{NAME} has numbers beyond 65504"):
        written(simple(Grid(4, 32, "f16", True), 6e4), tmp_path / "a.mlpackage")
