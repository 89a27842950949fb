"""DequantizeLinear as anybody may write it, against ONNX's own ReferenceEvaluator, or refused with its name."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gemexport.formats.onnx import tensors
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import round_to, row_count

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

from onnx.reference import ReferenceEvaluator  # noqa: E402

WEIGHT = "model.layers.0.mlp.up_proj.weight"
INTEGERS = ("INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16", "INT32")
FLOATS = ("FLOAT4E2M1", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")
SCALES = {"FLOAT": "f32", "FLOAT16": "f16", "BFLOAT16": "bf16"}
SPREADS = ("tensor", "one", "axis 0", "axis 1", "axis -2", "blocks 0", "blocks 1", "blocks -1", "short blocks 1")
CONSUMERS = ("MatMul", "Transpose", "Gemm", "Gemm transB", "Gather")


def constant(name: str, values: NDArray[Any], kind: str) -> Any:
    number = getattr(onnx.TensorProto, kind)
    values = values.astype(np.float32) if "FLOAT" in kind else values.astype(np.int64)
    return onnx.helper.make_tensor(name, number, values.shape, values.reshape(-1).tolist())


def model(nodes: list[Any], initializers: list[Any], outputs: list[str], opset: int = 25) -> Any:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)
    given = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in outputs]
    graph = onnx.helper.make_graph(nodes, "g", [x], given, initializers)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=11)


def node(kind: str, *inputs: str, output: str = "y", **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, list(inputs), [output], name=f"the {kind}", **attributes)


def spread(how: str, shape: tuple[int, int]) -> tuple[tuple[int, ...], dict[str, int]]:
    """The shape of scales, and the attributes that say where they belong."""
    if how in ("tensor", "one"):
        return (() if how == "tensor" else (1,)), {}
    axis = int(how.split()[-1])
    if how.startswith("axis"):
        return (shape[axis],), {"axis": axis}
    block = 5 if how.startswith("short") else 4
    sizes = list(shape)
    sizes[axis] = -(-sizes[axis] // block)
    return tuple(sizes), {"axis": axis, "block_size": block}


def codes_of(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if kind in FLOATS:
        return rng.choice([0, 0.5, -0.5, 1, 1.5, -2, 3, 4, -6], shape)
    bits = min(24, int(kind.removeprefix("U").removeprefix("INT")))  # the evaluator rounds larger ones to float32 first
    low = 0 if kind.startswith("U") else -(1 << (bits - 1))
    return rng.integers(low, low + (1 << bits), shape)


def consumers(how: str, value: str) -> list[Any]:
    """Operators that read a weight, as exporters write them."""
    if how == "Transpose":
        return [node("Transpose", value, output="t", perm=[1, 0]), node("MatMul", "x", "t")]
    if how.startswith("Gemm"):
        return [node("Gemm", "x", value, transB=int(how == "Gemm transB"))]
    return [node("Gather", value, "x")] if how == "Gather" else [node("MatMul", "x", value)]


def reference(proto: Any) -> NDArray[np.float32]:
    """What ONNX's evaluator gives as `w`, from the operators up to that."""
    nodes = list(proto.graph.node)
    last = next(i for i, item in enumerate(nodes) if item.output[0] == "w")
    part = model(nodes[: last + 1], list(proto.graph.initializer), ["w"])
    (found,) = ReferenceEvaluator(part).run(["w"], {"x": np.zeros(1, np.float32)})
    return np.asarray(found).astype(np.float32)


def check(proto: Any, path: Path, name: str, scale: str, turned: bool) -> None:
    """The tensor is what the ReferenceEvaluator gives as `w`: whole, by rows, and on its grid."""
    onnx.save(proto, path)
    wanted = reference(proto)
    wanted = wanted.T if turned else wanted
    found = tensors(path)[name]
    assert found.shape == (wanted.shape or (1,))
    with np.errstate(invalid="ignore", over="ignore"):
        # What comes out of the reference is of the scales' type; what is read is not rounded to it.
        whole = round_to(found.numpy(), SCALES[scale])  # type: ignore[arg-type]
    np.testing.assert_array_equal(whole.reshape(wanted.shape), wanted)
    count = row_count(found.shape)
    rows = [found.rows(i, min(i + 2, count)).values for i in range(0, count, 2)]
    np.testing.assert_array_equal(np.concatenate(rows).reshape(found.shape), found.numpy())
    if found.grid is not None:
        part = found.rows(0, count)
        assert part.codes is not None
        assert part.scales is not None
        assert part.codes.shape == (count, found.shape[-1])
        assert part.scales.shape == (count, found.shape[-1] // found.grid.block)


def dequantizing(
    kind: str, how: str, zero: bool, scale: str, shape: tuple[int, int], seed: int
) -> tuple[Any, list[Any]]:
    """A DequantizeLinear of a random weight, and its initializers."""
    rng = np.random.default_rng(seed)
    sizes, attributes = spread(how, shape)
    initializers = [
        constant(WEIGHT, codes_of(rng, kind, shape), kind),
        constant("s", rng.uniform(0.01, 1, sizes), scale),
    ]
    if zero:
        zeros = np.zeros(sizes) if kind in FLOATS or kind == "INT32" else codes_of(rng, kind, sizes)
        initializers.append(constant("z", zeros, kind))
    inputs = [WEIGHT, "s", *(["z"] if zero else [])]
    return node("DequantizeLinear", *inputs, output="w", **attributes), initializers


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("how", SPREADS)
@pytest.mark.parametrize("kind", [*INTEGERS, *FLOATS])
def test_every_type_axis_and_zero_point(kind: str, how: str, zero: bool, tmp_path: Path) -> None:
    for seed, (consumer, shape) in enumerate(itertools.product(CONSUMERS[:2], [(6, 8), (5, 7)])):
        dequantize, initializers = dequantizing(kind, how, zero, "FLOAT", shape, seed)
        proto = model([dequantize, *consumers(consumer, "w")], initializers, ["y", "w"])
        check(proto, tmp_path / f"{seed}.onnx", WEIGHT, "FLOAT", consumer == "MatMul")


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([*INTEGERS, *FLOATS]),
    how=st.sampled_from(SPREADS),
    zero=st.booleans(),
    scale=st.sampled_from(sorted(SCALES)),
    consumer=st.sampled_from(CONSUMERS),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    cast=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_of_them_between_any_operators(
    kind: str,
    how: str,
    zero: bool,
    scale: str,
    consumer: str,
    shape: tuple[int, int],
    cast: bool,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    dequantize, initializers = dequantizing(kind, how, zero, scale, shape, seed)
    after = [node("Cast", "w", output="c", to=onnx.TensorProto.FLOAT)] if cast else []
    proto = model([dequantize, *after, *consumers(consumer, "c" if cast else "w")], initializers, ["y", "w"])
    turned = consumer in ("MatMul", "Gemm")
    check(proto, tmp_path_factory.mktemp("model") / "model.onnx", WEIGHT, scale, turned)


@pytest.mark.parametrize("how", SPREADS)
@pytest.mark.parametrize("kind", ["INT4", "UINT8"])
def test_a_transpose_before(how: str, kind: str, tmp_path: Path) -> None:
    dequantize, initializers = dequantizing(kind, how, True, "FLOAT", (6, 8), 5)
    (sizes, attributes), shape = spread(how, (8, 6)), (8, 6)
    rng = np.random.default_rng(6)
    initializers = [
        initializers[0],
        *[
            constant(n, v, k)
            for n, v, k in (("s", rng.uniform(0.01, 1, sizes), "FLOAT"), ("z", codes_of(rng, kind, sizes), kind))
        ],
    ]
    dequantize = node("DequantizeLinear", "t", "s", "z", output="w", **attributes)
    nodes = [node("Transpose", WEIGHT, output="t", perm=[1, 0]), dequantize, node("MatMul", "x", "w")]
    check(model(nodes, initializers, ["y", "w"]), tmp_path / "model.onnx", WEIGHT, "FLOAT", turned=True)
    assert tensors(tmp_path / "model.onnx")[WEIGHT].shape == shape[::-1]


@pytest.mark.parametrize("how", SPREADS)
@pytest.mark.parametrize("kind", ["INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16"])
def test_floats_that_a_graph_rounds(how: str, kind: str, tmp_path: Path) -> None:
    """QuantizeLinear and DequantizeLinear in a row: what they leave of a weight is the weight."""
    rng = np.random.default_rng(7)
    sizes, attributes = spread(how, (6, 8))
    initializers = [
        constant(WEIGHT, rng.normal(size=(6, 8)), "FLOAT"),
        constant("s", rng.uniform(0.05, 0.3, sizes), "FLOAT"),
        constant("z", codes_of(rng, kind, sizes), kind),
    ]
    nodes = [
        node("QuantizeLinear", WEIGHT, "s", "z", output="q", **attributes),
        node("DequantizeLinear", "q", "s", "z", output="w", **attributes),
        node("MatMul", "x", "w"),
    ]
    check(model(nodes, initializers, ["y", "w"]), tmp_path / "model.onnx", WEIGHT, "FLOAT", turned=True)


def test_experts_of_three_axes_and_vectors(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    experts = constant(WEIGHT, rng.integers(-8, 8, (3, 4, 8)), "INT4")
    scales = constant("s", rng.uniform(0.1, 1, (3, 4, 2)), "FLOAT")
    dequantize = node("DequantizeLinear", WEIGHT, "s", output="w", axis=2, block_size=4)
    check(model([dequantize], [experts, scales], ["w"]), tmp_path / "a.onnx", WEIGHT, "FLOAT", turned=False)
    turned = node("MatMul", "x", "w")
    proto = model([dequantize, turned], [experts, scales], ["w", "y"])
    onnx.save(proto, tmp_path / "b.onnx")
    found = tensors(tmp_path / "b.onnx")[WEIGHT]
    np.testing.assert_array_equal(found.numpy(), reference(proto).swapaxes(1, 2))
    norm = "model.norm.weight"
    for kind, sizes in (("UINT8", ()), ("INT8", ()), ("INT16", (6,)), ("FLOAT8E4M3FN", ())):
        stored = constant(norm, codes_of(rng, kind, (6,)), kind)
        nodes = [node("DequantizeLinear", norm, "s", output="w", axis=0)]
        initializers = [stored, constant("s", rng.uniform(0.1, 1, sizes), "FLOAT")]
        check(model(nodes, initializers, ["w"]), tmp_path / f"{kind}.onnx", norm, "FLOAT", turned=False)


def refused(nodes: list[Any], initializers: list[Any], path: Path) -> str:
    onnx.save(model(nodes, initializers, ["y"]), path)
    with pytest.raises(InputError) as caught:
        tensors(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_of_the_standard_is_refused_by_name(tmp_path: Path) -> None:
    weight, path = constant(WEIGHT, np.ones((6, 8)), "INT8"), tmp_path / "model.onnx"
    scale, zero = constant("s", np.ones(7), "FLOAT"), constant("z", np.ones(()), "FLOAT8E4M3FN")
    dequantize = node("DequantizeLinear", WEIGHT, "s")
    said = refused([dequantize], [weight, scale], path)
    assert f"DequantizeLinear the DequantizeLinear reads {WEIGHT} with scales FLOAT [7]" in said
    assert "input 1 of DequantizeLinear" in refused([node("DequantizeLinear", WEIGHT, "x")], [weight], path)
    small = constant(WEIGHT, np.ones((6, 8)), "FLOAT8E4M3FN")
    scaled = node("DequantizeLinear", WEIGHT, "s", "z")
    assert "with zero points" in refused([scaled], [small, constant("s", np.ones(()), "FLOAT"), zero], path)
    narrow = [node("Cast", WEIGHT, output="c", to=onnx.TensorProto.INT4), node("DequantizeLinear", "c", "s")]
    assert "cast from INT8 to INT4" in refused(narrow, [weight, constant("s", np.ones(()), "FLOAT")], path)
    # A QuantizeLinear whose integers another operator reads, or that are read back by other scales.
    floats, one = constant(WEIGHT, np.ones((6, 8)), "FLOAT"), constant("s", np.ones(()), "FLOAT")
    quantize = node("QuantizeLinear", WEIGHT, "s", output="q")
    assert "no DequantizeLinear" in refused([quantize, node("MatMulInteger", "x", "q")], [floats, one], path)
    other = constant("other", np.full((), 2), "FLOAT")
    back = node("DequantizeLinear", "q", "other")
    assert "reads back others" in refused([quantize, back], [floats, one, other], path)


@pytest.mark.parametrize("kind", ["INT8", "UINT8", "INT4", "FLOAT8E4M3FN", "DOUBLE", "INT64"])
@pytest.mark.parametrize("operator", ["MatMulInteger", "Gather", "Mul"])
def test_a_weight_that_is_not_understood_is_named(operator: str, kind: str, tmp_path: Path) -> None:
    inputs = (WEIGHT, "x") if operator == "Gather" else ("x", WEIGHT)
    said = refused([node(operator, *inputs)], [constant(WEIGHT, np.ones((6, 8)), kind)], tmp_path / "model.onnx")
    assert f"{operator} the {operator} reads {WEIGHT} ({kind}) in a way not known here" in said


@pytest.mark.parametrize("through", ["DequantizeLinear", "MatMul", "Gemm"])
def test_a_weight_without_a_name_is_named(through: str, tmp_path: Path) -> None:
    name, scale = "onnx::MatMul_3415", constant("s", np.ones(()), "FLOAT")
    weight = constant(name, np.ones((6, 8)), "INT8" if through == "DequantizeLinear" else "FLOAT")
    dequantize = [node("DequantizeLinear", name, "s", output="w"), node("MatMul", "x", "w")]
    nodes = dequantize if through == "DequantizeLinear" else [node(through, "x", name)]
    said = refused(nodes, [weight, scale], tmp_path / "model.onnx")
    assert f"multiplies by {name}, which is no name of a checkpoint's tensor" in said
    # A vector, or what is multiplied by nothing, is no weight.
    small = [constant(name, np.ones((8, 1)), "FLOAT"), constant("b", np.ones((6, 8)), "FLOAT")]
    nodes = [node("MatMul", "x", name), node("Add", "y", "b", output="z")]
    onnx.save(model(nodes, small, ["z"]), tmp_path / "small.onnx")
    assert tensors(tmp_path / "small.onnx") == {}


def test_a_weight_that_nothing_reads_is_no_weight(tmp_path: Path) -> None:
    onnx.save(model([node("Neg", "x")], [constant(WEIGHT, np.ones((6, 8)), "INT8")], ["y"]), tmp_path / "model.onnx")
    assert tensors(tmp_path / "model.onnx") == {}


def test_names_of_onnxruntimes_quantizer(tmp_path: Path) -> None:
    name = f"{WEIGHT}_quantized"
    nodes = [node("DequantizeLinear", name, "s", output="w"), node("MatMul", "x", "w")]
    initializers = [constant(name, np.ones((6, 8)), "INT8"), constant("s", np.ones(()), "FLOAT")]
    onnx.save(model(nodes, initializers, ["y"]), tmp_path / "model.onnx")
    assert list(tensors(tmp_path / "model.onnx")) == [WEIGHT]
