"""Every MIL operation of the evaluator against coremltools' own reference of it, or against numpy where it has none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

ct = pytest.importorskip("coremltools")

from coremltools.converters.mil.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import Function  # noqa: E402

from gemexport.validators import coreml_evaluator  # noqa: E402, F401  (registers the operations)
from gemexport.validators.coreml_registry import OPERATIONS, as_tensor  # noqa: E402

RNG = np.random.default_rng(7)
X = RNG.normal(size=(2, 3, 4)).astype(np.float32)
Y = RNG.normal(size=(2, 3, 4)).astype(np.float32)
SMALL = RNG.uniform(-0.9, 0.9, size=(3, 4)).astype(np.float32)
POSITIVE = RNG.uniform(0.1, 3, size=(3, 4)).astype(np.float32)
INTS = RNG.integers(-5, 6, size=(2, 3, 4)).astype(np.int32)
BOOLS = RNG.integers(0, 2, size=(2, 3, 4)).astype(bool)


def expected(name: str, inputs: dict[str, Any], opset: Any = None) -> list[np.ndarray]:
    """What coremltools infers for the operation on constant inputs."""
    with Function({"unused": mb.placeholder((1,))}, opset or ct.target.iOS18):
        result = getattr(mb, name)(**inputs)
    results = result if isinstance(result, list | tuple) else [result]
    assert all(item.val is not None for item in results), f"coremltools has no reference of {name}"
    return [np.asarray(item.val) for item in results]


def tensors(inputs: dict[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and any(isinstance(item, np.ndarray) for item in value):
            return [convert(item) for item in value]
        return as_tensor(np.asarray(value))

    return {key: convert(value) for key, value in inputs.items()}


def found(name: str, inputs: dict[str, Any]) -> list[np.ndarray]:
    result = OPERATIONS[name](**tensors(inputs))
    return [item.numpy() for item in (result if isinstance(result, tuple | list) else [result])]


CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"x": X}) for name in ("abs", "ceil", "cos", "cosh", "erf", "exp", "exp2", "floor", "round", "sign")),
    *((name, {"x": X}) for name in ("sin", "sinh", "square", "tan", "tanh", "relu", "relu6", "sigmoid", "softplus")),
    *((name, {"x": X}) for name in ("softsign", "softmax", "gelu")),
    *((name, {"x": SMALL}) for name in ("acos", "asin", "atan", "atanh")),
    *((name, {"x": POSITIVE}) for name in ("sqrt", "log", "rsqrt", "inverse")),
    *((name, {"x": X, "y": Y}) for name in ("add", "sub", "mul", "maximum", "minimum", "real_div", "mod", "floor_div")),
    *((name, {"x": INTS, "y": np.int32(3)}) for name in ("mod", "floor_div", "equal", "not_equal", "less")),
    *((name, {"x": X, "y": Y}) for name in ("less_equal", "greater", "greater_equal")),
    *((name, {"x": BOOLS, "y": ~BOOLS}) for name in ("logical_and", "logical_or", "logical_xor")),
    *((f"reduce_{k}", {"x": X, "axes": [1, -1], "keep_dims": True}) for k in ("sum", "mean", "max", "min", "prod")),
    *((f"reduce_{kind}", {"x": X, "axes": [0]}) for kind in ("l1_norm", "l2_norm", "sum_square", "log_sum_exp")),
    ("elu", {"x": X, "alpha": np.float32(0.5)}),
    ("leaky_relu", {"x": X, "alpha": np.float32(0.2)}),
    ("sigmoid_hard", {"x": X, "alpha": np.float32(0.3), "beta": np.float32(0.4)}),
    ("logical_not", {"x": BOOLS}),
    ("pow", {"x": POSITIVE, "y": np.float32(1.5)}),
    ("rsqrt", {"x": POSITIVE, "epsilon": np.float32(0.5)}),
    ("inverse", {"x": POSITIVE, "epsilon": np.float32(0.5)}),
    ("log", {"x": POSITIVE, "epsilon": np.float32(0.5)}),
    ("clip", {"x": X, "alpha": np.float32(-0.5), "beta": np.float32(0.25)}),
    ("threshold", {"x": X, "alpha": np.float32(0.1)}),
    ("gelu", {"x": X, "mode": "TANH_APPROXIMATION"}),
    ("gelu", {"x": X, "mode": "SIGMOID_APPROXIMATION"}),
    ("softmax", {"x": X, "axis": 1}),
    ("linear_activation", {"x": X, "alpha": np.float32(2), "beta": np.float32(-1)}),
    ("scaled_tanh", {"x": X, "alpha": np.float32(2), "beta": np.float32(0.5)}),
    ("reduce_log_sum", {"x": POSITIVE, "axes": [1]}),
    ("reduce_argmax", {"x": X, "axis": 1, "keep_dims": True}),
    ("reduce_argmin", {"x": X, "axis": -1}),
    ("select", {"cond": BOOLS, "a": X, "b": Y}),
    ("cast", {"x": X * 3, "dtype": "int32"}),
    ("cast", {"x": INTS, "dtype": "fp32"}),
    ("cast", {"x": INTS, "dtype": "bool"}),
    ("linear", {"x": X, "weight": SMALL, "bias": np.arange(3, dtype=np.float32)}),
    ("matmul", {"x": X, "y": Y, "transpose_y": True}),
    ("matmul", {"x": X, "y": Y, "transpose_x": True}),
    ("layer_norm", {"x": X, "axes": [-1], "gamma": POSITIVE[0], "beta": SMALL[0], "epsilon": np.float32(1e-3)}),
    ("l2_norm", {"x": X}),
    ("shape", {"x": X}),
    ("reshape", {"x": X, "shape": [4, -1]}),
    ("transpose", {"x": X, "perm": [2, 0, 1]}),
    ("expand_dims", {"x": X, "axes": [0, -1]}),
    ("squeeze", {"x": X[:1], "axes": [0]}),
    ("flatten2d", {"x": X, "axis": 2}),
    ("concat", {"values": [X, Y], "axis": 1}),
    ("stack", {"values": [X, Y], "axis": 1}),
    ("split", {"x": X, "axis": 2, "split_sizes": [1, 3]}),
    ("split", {"x": X, "axis": 2, "num_splits": 2}),
    ("tile", {"x": X, "reps": [1, 2, 3]}),
    ("reverse", {"x": X, "axes": [0, 2]}),
    ("slice_by_index", {"x": X, "begin": [0, 1, 3], "end": [1, 3, 0], "stride": [1, 2, -1]}),
    (
        "slice_by_index",
        {
            "x": X,
            "begin": [1, -2, 9],
            "end": [9, 9, 9],
            "begin_mask": [False, False, True],
            "end_mask": [False, True, True],
            "squeeze_mask": [True, False, False],
        },
    ),
    ("slice_by_size", {"x": X, "begin": [0, 1, 1], "size": [2, -1, 2]}),
    ("slice_update", {"x": X, "update": Y[:1, :2], "begin": [1, 1, 0], "end": [2, 3, 4]}),
    (
        "slice_update",
        {"x": X, "update": Y[0], "begin": [1, 0, 0], "end": [2, 3, 4], "squeeze_mask": [True, False, False]},
    ),
    ("gather", {"x": X, "indices": np.array([[1, 0], [2, 2]], np.int32), "axis": 1}),
    ("gather", {"x": X, "indices": np.array([[1, 0], [2, 2]], np.int32), "axis": 1, "batch_dims": 1}),
    ("gather_along_axis", {"x": X, "indices": np.array([[[2, 0, 1, 1]]] * 2, np.int32), "axis": 1}),
    ("pad", {"x": X, "pad": [0, 1, 2, 0], "mode": "constant", "constant_val": np.float32(5)}),
    ("pad", {"x": X, "pad": [1, 1], "mode": "reflect"}),
    ("range_1d", {"start": np.int32(2), "end": np.int32(9), "step": np.int32(3)}),
    ("fill", {"shape": [2, 3], "value": np.float32(1.5)}),
    ("band_part", {"x": SMALL, "lower": 1, "upper": 0}),
    ("band_part", {"x": SMALL, "lower": -1, "upper": 1}),
    ("cumsum", {"x": X, "axis": 1, "reverse": True}),
    ("topk", {"x": X, "k": 2, "axis": 1}),
    ("topk", {"x": X, "k": 2, "axis": -1, "ascending": True}),
    ("argsort", {"x": X, "axis": 1, "ascending": True}),
    ("non_zero", {"x": INTS}),
    ("scaled_dot_product_attention", {"query": X, "key": Y, "value": Y, "attn_mask": X[:, :, :3]}),
    ("scaled_dot_product_attention", {"query": X, "key": Y, "value": Y, "attn_mask": np.tri(3, dtype=bool)[None]}),
    ("quantize", {"input": X, "scale": np.float32(0.05), "output_dtype": "int8"}),
]


@pytest.mark.parametrize(("name", "inputs"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_agrees_with_coremltools(name: str, inputs: dict[str, Any]) -> None:
    wanted = expected(name, inputs)
    for got, want in zip(found(name, inputs), wanted, strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_operations_without_a_reference_in_coremltools() -> None:
    np.testing.assert_allclose(found("silu", {"x": X})[0], X / (1 + np.exp(-X)), rtol=1e-5)
    (total,) = found("cumsum", {"x": SMALL, "axis": 0, "exclusive": True})
    np.testing.assert_allclose(total, np.cumsum(SMALL, 0) - SMALL, atol=1e-6)
    (same,) = found("identity", {"x": X})
    assert (same == X).all()
    (like,) = found("fill_like", {"ref_tensor": X, "value": np.int32(3)})
    assert like.shape == X.shape
    assert (like == 3).all()
    # The example of coremltools' documentation; its own inference does not interleave.
    first, second = np.array([[1, 2], [3, 4], [5, 6]]), np.array([[7, 8], [9, 10], [11, 12]])
    (woven,) = found("concat", {"values": [first, second], "axis": 0, "interleave": True})
    assert woven.tolist() == [[1, 2], [7, 8], [3, 4], [9, 10], [5, 6], [11, 12]]
    (picked,) = found("gather_nd", {"x": X, "indices": np.array([[1, 2], [0, 0]], np.int32)})
    assert (picked == X[[1, 0], [2, 0]]).all()
    (hot,) = found("one_hot", {"indices": np.array([2, 0]), "one_hot_vector_size": 3, "on_value": 2.0, "axis": 0})
    assert hot.tolist() == [[0, 2], [0, 0], [2, 0]]
    scale, zero = np.array([0.5, 1, 2], np.float32), np.array([1, 0, -1], np.int8)
    (real,) = found("dequantize", {"input": INTS.astype(np.int8), "scale": scale, "zero_point": zero, "axis": 1})
    assert (real == (INTS - zero[:, None]) * scale[:, None]).all()
    (product,) = found("einsum", {"values": [X, Y], "equation": "bij,bkj->bik"})
    np.testing.assert_allclose(product, np.einsum("bij,bkj->bik", X, Y), rtol=1e-4, atol=1e-6)


def test_norms_over_channels() -> None:
    image = RNG.normal(size=(2, 3, 4, 5)).astype(np.float32)
    mean, variance = image.mean((0, 2, 3)), image.var((0, 2, 3))
    (batch,) = found("batch_norm", {"x": image, "mean": mean, "variance": variance, "epsilon": np.float32(1e-3)})
    shape = (1, 3, 1, 1)
    want = (image - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + 1e-3)
    np.testing.assert_allclose(batch, want, rtol=1e-4, atol=1e-5)
    (instance,) = found("instance_norm", {"x": image})
    want = (image - image.mean((2, 3), keepdims=True)) / np.sqrt(image.var((2, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(instance, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pad_type", ["valid", "same", "same_lower", "custom"])
def test_convolution(pad_type: str) -> None:
    image = RNG.normal(size=(1, 2, 6, 5)).astype(np.float32)
    kernel = RNG.normal(size=(4, 1, 2, 3)).astype(np.float32)
    around = {"valid": (0, 0, 0, 0), "same": (0, 0, 1, 1), "same_lower": (0, 0, 1, 1), "custom": (1, 0, 2, 1)}[pad_type]
    inputs = {"x": image, "weight": kernel, "strides": [2, 1], "pad_type": pad_type, "groups": np.int32(2)}
    (got,) = found("conv", inputs | ({"pad": list(around)} if pad_type == "custom" else {}))
    top, bottom, left, right = around
    padded = torch.nn.functional.pad(torch.from_numpy(image), (left, right, top, bottom))
    want = torch.conv2d(padded, torch.from_numpy(kernel), stride=(2, 1), groups=2).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_an_even_kernel_pads_after_or_before() -> None:
    image = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
    kernel = np.array([[[1.0, 10.0]]], np.float32)
    (upper,) = found("conv", {"x": image, "weight": kernel, "pad_type": "same"})
    (lower,) = found("conv", {"x": image, "weight": kernel, "pad_type": "same_lower"})
    assert upper.ravel().tolist() == [10, 21, 32, 3]
    assert lower.ravel().tolist() == [0, 10, 21, 32]


def test_attention_ignores_what_is_masked_with_minus_infinity() -> None:
    mask = np.where(np.tri(3), 0, -math.inf).astype(np.float32)[None]
    (got,) = found("scaled_dot_product_attention", {"query": X, "key": Y, "value": Y, "attn_mask": mask})
    np.testing.assert_allclose(got[:, 0], Y[:, 0], rtol=1e-5)


def test_a_shorter_update_of_a_slice_backwards_is_refused() -> None:
    with pytest.raises(ValueError, match="negative stride"):
        found("slice_update", {"x": X, "update": Y, "begin": [0, 0, 3], "end": [2, 3, 0], "stride": [1, 1, -1]})
