"""Every MIL operation of the evaluator on random shapes, against coremltools' own inference of constant inputs.

It has none of some; those are held to what its documentation says, spelled out in `test_coreml_loops.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemexport.validators.mil.registry import OPERATIONS, as_tensor
from gemexport.validators.runtimes.coreml import Program

ct = pytest.importorskip("coremltools")

from coremltools.converters.mil.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import Function, types  # noqa: E402
from coremltools.converters.mil.mil import Program as MILProgram  # noqa: E402
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry  # noqa: E402

from gemexport.exporters.coreml.package import write_package  # noqa: E402

SEEDS = (0, 1, 2)
Inputs = dict[str, Any]


class Draw:
    """Random inputs of one case; sizes are drawn once and stay, so that inputs fit each other."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.sizes = {letter: int(self.rng.integers(2, 6)) for letter in "abcdef"}

    def shape(self, letters: str) -> tuple[int, ...]:
        """The sizes that letters stand for; a digit is itself."""
        return tuple(int(letter) if letter.isdigit() else self.sizes[letter] for letter in letters)

    def x(self, letters: str = "abc") -> NDArray[np.float32]:
        return self.rng.normal(size=self.shape(letters)).astype(np.float32)

    def small(self, letters: str = "abc") -> NDArray[np.float32]:
        return self.rng.uniform(-0.9, 0.9, self.shape(letters)).astype(np.float32)

    def positive(self, letters: str = "abc") -> NDArray[np.float32]:
        return self.rng.uniform(0.1, 3, self.shape(letters)).astype(np.float32)

    def ints(self, letters: str = "abc", low: int = -5, high: int = 6) -> NDArray[np.int32]:
        return self.rng.integers(low, high, self.shape(letters)).astype(np.int32)

    def bools(self, letters: str = "abc") -> NDArray[np.bool_]:
        return self.rng.integers(0, 2, self.shape(letters)).astype(bool)

    def seen(self, letters: str) -> NDArray[np.bool_]:
        """A mask by which everybody sees somebody."""
        mask = self.bools(letters)
        mask[..., 0] = True
        return mask

    def axis(self, rank: int = 3) -> np.int32:
        return np.int32(self.rng.integers(-rank, rank))

    def one(self, low: float = 0.1, high: float = 2) -> np.float32:
        return np.float32(self.rng.uniform(low, high))


def expected(name: str, inputs: Inputs) -> list[NDArray[Any]]:
    """What coremltools infers for the operation on constant inputs."""
    with Function({"unused": mb.placeholder((1,))}, ct.target.iOS18):
        result = getattr(mb, name)(**inputs)
    results = result if isinstance(result, list | tuple) else [result]
    assert all(item.val is not None for item in results), f"coremltools has no reference of {name}"
    return [np.asarray(item.val) for item in results]


def found(name: str, inputs: Inputs) -> list[NDArray[Any]]:
    """What the evaluator's function of the operation gives."""

    def convert(value: Any) -> Any:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and any(isinstance(item, np.ndarray) for item in value):
            return [convert(item) for item in value]
        return as_tensor(np.asarray(value))

    result = OPERATIONS[name](**{key: convert(value) for key, value in inputs.items()})
    return [item.numpy() for item in (result if isinstance(result, tuple | list) else [result])]


def evaluated(name: str, inputs: Inputs, folder: Path) -> list[NDArray[Any]]:
    """What the evaluator makes of a package of this operation alone, fed with all that need not be constant."""
    specification = SSAOpRegistry.core_ops[name][ct.target.iOS18].input_spec.input_types
    fed: dict[str, NDArray[Any]] = {}
    given: Inputs = {}
    for key, value in inputs.items():
        parts = value if isinstance(value, list) and isinstance(value[0], np.ndarray) else [value]
        constant = specification[key].const or any(
            not isinstance(part, np.ndarray) or part.dtype not in (np.float32, np.int32) for part in parts
        )
        for i, part in enumerate([] if constant else parts):
            fed[f"{key}_{i}"] = part
        given[key] = value if constant else None
    kinds = {"float32": types.fp32, "int32": types.int32}
    placeholders = {key: mb.placeholder(part.shape, kinds[str(part.dtype)]) for key, part in fed.items()}
    with Function(placeholders, ct.target.iOS18) as function:
        for key in (key for key, value in given.items() if value is None):
            parts = [function.inputs[name] for name in fed if name.rpartition("_")[0] == key]
            given[key] = parts if isinstance(inputs[key], list) else parts[0]
        result = getattr(mb, name)(**given)
        results = list(result) if isinstance(result, list | tuple) else [result]
        # A program may give float32 and int32 only.
        function.set_outputs(
            [x if x.dtype in (types.fp32, types.int32) else mb.cast(x=x, dtype="int32") for x in results]
        )
    function.set_input_types(tuple(ct.TensorType(key, part.shape, part.dtype.type) for key, part in fed.items()))
    program = MILProgram()
    program.add_function("main", function)
    folder.mkdir()
    write_package(folder, program, {}, lambda writer, constants: [writer.write(*item) for item in constants.items()])
    return list(Program(folder).predict(fed).values())


def check(got: list[NDArray[Any]], wanted: list[NDArray[Any]]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one.astype(other.dtype), other, rtol=3e-5, atol=3e-6)


Make = Callable[[Draw], Inputs]


def each(names: str, make: Make) -> list[tuple[str, Make]]:
    return [(name, make) for name in names.split()]


CASES: list[tuple[str, Make]] = [
    *each("abs ceil cos cosh erf exp exp2 floor round sign sin sinh square tan tanh", lambda d: {"x": d.x()}),
    *each("relu relu6 sigmoid softplus softsign softmax gelu identity", lambda d: {"x": d.x("abcd") * 4}),
    *each("acos asin atan atanh", lambda d: {"x": d.small()}),
    *each("sqrt log rsqrt inverse", lambda d: {"x": d.positive()}),
    *each("log rsqrt inverse", lambda d: {"x": d.positive(), "epsilon": d.one()}),
    *each("add sub mul maximum minimum real_div mod floor_div", lambda d: {"x": d.x("abc"), "y": d.x("1bc")}),
    *each("add sub mul mod floor_div equal not_equal less", lambda d: {"x": d.ints(), "y": np.int32(3)}),
    *each("less_equal greater greater_equal", lambda d: {"x": d.x("abc"), "y": d.x("c")}),
    *each("logical_and logical_or logical_xor", lambda d: {"x": d.bools(), "y": d.bools()}),
    *each(
        "reduce_sum reduce_mean reduce_max reduce_min reduce_prod",
        lambda d: {"x": d.x(), "axes": [1, -1], "keep_dims": True},
    ),
    *each("reduce_sum reduce_max reduce_mean reduce_prod", lambda d: {"x": d.x("abcd")}),
    *each("reduce_l1_norm reduce_l2_norm reduce_sum_square reduce_log_sum_exp", lambda d: {"x": d.x(), "axes": [0]}),
    ("reduce_log_sum", lambda d: {"x": d.positive(), "axes": [1]}),
    *each("reduce_argmax reduce_argmin", lambda d: {"x": d.x(), "axis": d.axis(), "keep_dims": True}),
    *each("reduce_argmax reduce_argmin", lambda d: {"x": d.x(), "axis": d.axis()}),
    ("logical_not", lambda d: {"x": d.bools()}),
    ("pow", lambda d: {"x": d.positive(), "y": d.x("abc")}),
    ("clip", lambda d: {"x": d.x(), "alpha": np.float32(-0.5), "beta": d.one()}),
    ("threshold", lambda d: {"x": d.x(), "alpha": d.one()}),
    ("select", lambda d: {"cond": d.bools(), "a": d.x(), "b": d.x()}),
    ("cast", lambda d: {"x": d.x() * 9, "dtype": "int32"}),
    ("cast", lambda d: {"x": d.ints(), "dtype": "fp32"}),
    ("cast", lambda d: {"x": d.ints("abc", -1, 2), "dtype": "bool"}),
    # activations
    ("elu", lambda d: {"x": d.x(), "alpha": d.one()}),
    ("leaky_relu", lambda d: {"x": d.x(), "alpha": d.one(0, 0.5)}),
    ("clamped_relu", lambda d: {"x": d.x() * 3, "alpha": d.one(0, 0.5), "beta": d.one()}),
    ("thresholded_relu", lambda d: {"x": d.x(), "alpha": d.one()}),
    ("prelu", lambda d: {"x": d.x("abcd"), "alpha": d.positive("b")}),
    ("softplus_parametric", lambda d: {"x": d.x("abcd"), "alpha": d.positive("b"), "beta": d.positive("b")}),
    ("sigmoid_hard", lambda d: {"x": d.x() * 3, "alpha": d.one(), "beta": d.one()}),
    ("linear_activation", lambda d: {"x": d.x(), "alpha": d.one(), "beta": d.one()}),
    ("scaled_tanh", lambda d: {"x": d.x(), "alpha": d.one(), "beta": d.one()}),
    ("gelu", lambda d: {"x": d.x(), "mode": "TANH_APPROXIMATION"}),
    ("gelu", lambda d: {"x": d.x(), "mode": "SIGMOID_APPROXIMATION"}),
    ("softmax", lambda d: {"x": d.x(), "axis": d.axis()}),
    # matrices, norms, attention
    ("linear", lambda d: {"x": d.x("abc"), "weight": d.x("dc"), "bias": d.x("d")}),
    ("linear", lambda d: {"x": d.x("ac"), "weight": d.x("dc")}),
    ("matmul", lambda d: {"x": d.x("abc"), "y": d.x("1cd")}),
    ("matmul", lambda d: {"x": d.x("eabc"), "y": d.x("dc"), "transpose_y": True}),
    ("matmul", lambda d: {"x": d.x("acb"), "y": d.x("acd"), "transpose_x": True}),
    ("einsum", lambda d: {"values": [d.x("abcd"), d.x("adce")], "equation": "nchw,nwhu->nchu"}),
    ("einsum", lambda d: {"values": [d.x("bcd"), d.x("dce")], "equation": "chw,whr->chr"}),
    ("layer_norm", lambda d: {"x": d.x(), "axes": [-1], "gamma": d.x("c"), "beta": d.x("c"), "epsilon": d.one()}),
    ("layer_norm", lambda d: {"x": d.x("abcd"), "axes": [1, 2], "gamma": d.x("bc"), "beta": d.x("bc")}),
    ("layer_norm", lambda d: {"x": d.x("abcd"), "axes": [1], "gamma": d.x("b"), "beta": d.x("b")}),
    ("layer_norm", lambda d: {"x": d.x(), "axes": [0, 1, 2]}),
    ("l2_norm", lambda d: {"x": d.x()}),
    ("l2_norm", lambda d: {"x": d.x("abcd"), "epsilon": d.one()}),
    (
        "scaled_dot_product_attention",
        lambda d: {"query": d.x("abcd"), "key": d.x("abed"), "value": d.x("abed"), "attn_mask": d.x("11ce")},
    ),
    (
        "scaled_dot_product_attention",
        lambda d: {"query": d.x("acd"), "key": d.x("aed"), "value": d.x("aed"), "attn_mask": d.seen("1ce")},
    ),
    ("quantize", lambda d: {"input": d.x(), "scale": d.one(0.01, 0.05), "output_dtype": "int8"}),
    (
        "quantize",
        lambda d: {
            "input": d.x(),
            "scale": d.one(0.01, 0.05),
            "zero_point": np.uint8(d.rng.integers(256)),
            "output_dtype": "uint8",
        },
    ),
    (
        "quantize",
        lambda d: {
            "input": d.x("abc"),
            "scale": d.positive("b") / 40,
            "zero_point": d.ints("b").astype(np.int8),
            "axis": 1,
            "output_dtype": "int8",
        },
    ),
    # shapes
    ("shape", lambda d: {"x": d.x("abcd")}),
    ("reshape", lambda d: {"x": d.x("a2c"), "shape": [2, -1]}),
    ("transpose", lambda d: {"x": d.x(), "perm": [2, 0, 1]}),
    ("expand_dims", lambda d: {"x": d.x(), "axes": [0, -1]}),
    ("expand_dims", lambda d: {"x": d.x(), "axes": [1, 2]}),
    ("squeeze", lambda d: {"x": d.x("1b1"), "axes": [0, -1]}),
    ("flatten2d", lambda d: {"x": d.x("abcd"), "axis": np.int32(d.rng.integers(1, 4))}),
    ("concat", lambda d: {"values": [d.x("abc"), d.x("adc"), d.x("aec")], "axis": 1}),
    ("stack", lambda d: {"values": [d.x(), d.x()], "axis": d.axis(3)}),
    ("split", lambda d: {"x": d.x("ab5"), "axis": 2, "split_sizes": [1, 4]}),
    ("split", lambda d: {"x": d.x("ab6"), "axis": -1, "num_splits": 3}),
    ("tile", lambda d: {"x": d.x(), "reps": [1, 2, 3]}),
    ("reverse", lambda d: {"x": d.x(), "axes": [0, -1]}),
    ("slice_by_index", lambda d: {"x": d.x("a46"), "begin": [0, 1, 5], "end": [1, 3, 0], "stride": [1, 2, -2]}),
    (
        "slice_by_index",
        lambda d: {
            "x": d.x("3b5"),
            "begin": [1, -2, 9],
            "end": [9, 9, 9],
            "begin_mask": [False, False, True],
            "end_mask": [False, True, True],
            "squeeze_mask": [True, False, False],
        },
    ),
    ("slice_by_size", lambda d: {"x": d.x("a34"), "begin": [0, 1, 1], "size": [2, -1, 2]}),
    ("slice_update", lambda d: {"x": d.x("234"), "update": d.x("124"), "begin": [1, 1, 0], "end": [2, 3, 4]}),
    (
        "slice_update",
        lambda d: {
            "x": d.x("3b4"),
            "update": d.x("b2"),
            "begin": [1, 0, 0],
            "end": [2, 0, 4],
            "stride": [1, 1, 2],
            "end_mask": [False, True, False],
            "squeeze_mask": [True, False, False],
        },
    ),
    ("pad", lambda d: {"x": d.x(), "pad": [0, 1, 2, 0], "mode": "constant", "constant_val": d.one()}),
    ("pad", lambda d: {"x": d.x("a34"), "pad": [1, 1], "mode": "reflect"}),
    ("pad", lambda d: {"x": d.x("a34"), "pad": [2, 1, 0, 3], "mode": "replicate"}),
    ("range_1d", lambda d: {"start": np.int32(2), "end": d.rng.integers(4, 30, dtype=np.int32), "step": np.int32(3)}),
    ("range_1d", lambda d: {"start": np.float32(0.5), "end": np.float32(4), "step": np.float32(0.75)}),
    ("fill", lambda d: {"shape": list(d.shape("abc")), "value": d.one()}),
    ("band_part", lambda d: {"x": d.x("abc"), "lower": 1, "upper": 0}),
    ("band_part", lambda d: {"x": d.x("bc"), "lower": -1, "upper": 1}),
    ("cumsum", lambda d: {"x": d.x(), "axis": 1, "reverse": True}),
    ("cumsum", lambda d: {"x": d.ints()}),
    # indices
    ("gather", lambda d: {"x": d.x("a4c"), "indices": d.ints("de", 0, 4), "axis": 1}),
    ("gather", lambda d: {"x": d.x("a4c"), "indices": d.ints("ad", 0, 4), "axis": 1, "batch_dims": 1}),
    ("gather_along_axis", lambda d: {"x": d.x("a3c"), "indices": d.ints("adc", 0, 3), "axis": 1}),
    (
        "scatter_along_axis",
        lambda d: {
            "data": d.x("a5c"),
            "indices": np.argsort(d.x("a5c"), axis=1)[:, :3].astype(np.int32),
            "updates": d.x("a3c"),
            "axis": 1,
            "mode": "update",
        },
    ),
    ("topk", lambda d: {"x": d.x("a4c"), "k": 2, "axis": 1}),
    ("topk", lambda d: {"x": d.x("ab5"), "k": 3, "axis": -1, "ascending": True}),
    ("argsort", lambda d: {"x": d.x(), "axis": d.axis(), "ascending": True}),
    ("argsort", lambda d: {"x": d.x(), "axis": d.axis()}),
    ("non_zero", lambda d: {"x": d.ints("abc", -1, 2)}),
]
IDS = [f"{i}-{name}" for i, (name, _) in enumerate(CASES)]
# What coremltools computes at once when an input is constant, so that no operation is left to be evaluated.
FOLDED = {"shape", "range_1d", "fill"}


@pytest.mark.parametrize(("name", "make"), CASES, ids=IDS)
def test_agrees_with_coremltools(name: str, make: Make, tmp_path: Path) -> None:
    for seed in SEEDS:
        inputs = make(Draw(seed))
        wanted = expected(name, inputs)
        check(found(name, inputs), wanted)
    if name not in FOLDED and any(isinstance(value, np.ndarray | list) for value in inputs.values()):
        # Core ML gives no scalars: one element comes out.
        check(evaluated(name, inputs, tmp_path / "a.mlpackage"), [np.atleast_1d(item) for item in wanted])
