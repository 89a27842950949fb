"""MIL operations that coremltools does not infer, against plain loops that say what its documentation says."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

import gemexport.validators.mil.evaluator  # noqa: F401  (registers the operations)
from gemexport.validators.mil.registry import OPERATIONS, Unsupported, as_tensor

RNG = np.random.default_rng(3)
X = RNG.normal(size=(2, 3, 4)).astype(np.float32)
Array = NDArray[Any]


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.normal(size=shape).astype(np.float32)


def found(kind: str, **inputs: Any) -> Array:
    def convert(value: Any) -> Any:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and isinstance(value[0], np.ndarray):
            return [convert(item) for item in value]
        return as_tensor(np.asarray(value))

    result = OPERATIONS[kind](**{key: convert(value) for key, value in inputs.items()})
    return np.asarray(result.numpy())


def places(shape: tuple[int, ...]) -> Any:
    return itertools.product(*[range(size) for size in shape])


def test_operations_of_one_line() -> None:
    np.testing.assert_allclose(found("silu", x=X), X / (1 + np.exp(-X)), rtol=1e-5)
    np.testing.assert_allclose(found("cumsum", x=X, axis=0, exclusive=True), np.cumsum(X, 0) - X, atol=1e-6)
    like = found("fill_like", ref_tensor=X, value=np.int32(3))
    assert like.shape == X.shape
    assert (like == 3).all()
    # The example of coremltools' documentation; its own inference does not interleave.
    first, second = np.array([[1, 2], [3, 4], [5, 6]]), np.array([[7, 8], [9, 10], [11, 12]])
    woven = found("concat", values=[first, second], axis=0, interleave=True)
    assert woven.tolist() == [[1, 2], [7, 8], [3, 4], [9, 10], [5, 6], [11, 12]]
    codes = RNG.integers(-128, 128, (2, 3, 4)).astype(np.int8)
    scale, zero = np.array([0.5, 1, 2], np.float32), np.array([1, 0, -1], np.int8)
    real = found("dequantize", input=codes, scale=scale, zero_point=zero, axis=1)
    assert (real == (codes.astype(int) - zero[:, None]) * scale[:, None]).all()
    assert (found("reduce_mean", x=np.array([[1, 2], [2, 5]]), axes=[1]) == [1.5, 3.5]).all()


def test_one_hot_vectors() -> None:
    hot = found("one_hot", indices=np.array([2, 0]), one_hot_vector_size=3, on_value=2.0, axis=0)
    assert hot.tolist() == [[0, 2], [0, 0], [2, 0]]
    # An index that is no place lights nothing.
    assert found("one_hot", indices=np.array([-1, 3, 1]), one_hot_vector_size=3).tolist() == [
        [0] * 3,
        [0] * 3,
        [0, 1, 0],
    ]


def test_reshape_like() -> None:
    # The example of the documentation.
    references = [np.zeros((2, 3, 4)), np.zeros((1, 5, 6))]
    masks = [np.array(False), np.array(True)]
    x = np.arange(2 * 3 * 5 * 6)
    ends = [np.array(2), np.array(0)]
    got = found(
        "reshape_like", x=x, ref_tensors=references, begins=[np.array(0), np.array(1)], ends=ends, end_masks=masks
    )
    assert got.shape == (2, 3, 5, 6)


def test_reverse_sequence() -> None:
    got = found("reverse_sequence", x=X, lengths=np.array([3, 1, 4]), seq_axis=2, batch_axis=1)
    for a, b in places((2, 3)):
        length = [3, 1, 4][b]
        assert (got[a, b] == [*X[a, b, :length][::-1], *X[a, b, length:]]).all()


def test_sliding_windows() -> None:
    x = normal(2, 7, 3)
    got = found("sliding_windows", x=x, axis=-2, size=3, stride=2)
    assert got.shape == (2, 3, 3, 3)
    for window in range(3):
        assert (got[:, window] == x[:, 2 * window : 2 * window + 3]).all()


def test_gather_nd() -> None:
    index = RNG.integers(0, 2, (4, 5, 2))
    got = found("gather_nd", x=X, indices=index)
    for at in places((4, 5)):
        assert (got[at] == X[tuple(index[at])]).all()
    batched = found("gather_nd", x=X, indices=RNG.integers(0, 3, (2, 4, 1)), batch_dims=1)
    assert batched.shape == (2, 4, 4)


MODES = {
    "update": lambda old, new: new,
    "add": lambda old, new: old + new,
    "sub": lambda old, new: old - new,
    "mul": lambda old, new: old * new,
    "div": lambda old, new: old / new,
    "max": max,
    "min": min,
}


@pytest.mark.parametrize("mode", MODES)
def test_scatter(mode: str) -> None:
    data, index, updates = normal(2, 5, 3), np.array([4, 0, 4, 1]), normal(2, 4, 3)
    wanted = data.copy()
    for a, i, c in places(updates.shape):
        wanted[a, index[i], c] = MODES[mode](wanted[a, index[i], c], updates[a, i, c])
    got = found("scatter", data=data, indices=index, updates=updates, axis=1, mode=mode)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_scatter_along_axis(mode: str) -> None:
    data, index, updates = normal(2, 5, 3), RNG.integers(0, 5, (2, 4, 3)), normal(2, 4, 3)
    wanted = data.copy()
    for a, i, c in places(updates.shape):
        at = (a, index[a, i, c], c)
        wanted[at] = MODES[mode](wanted[at], updates[a, i, c])
    got = found("scatter_along_axis", data=data, indices=index, updates=updates, axis=-2, mode=mode)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_scatter_nd(mode: str) -> None:
    data, index, updates = normal(3, 4, 2), RNG.integers(0, 3, (5, 2, 2)), normal(5, 2, 2)
    wanted = data.copy()
    for i, j, c in places(updates.shape):
        at = (*index[i, j], c)
        wanted[at] = MODES[mode](wanted[at], updates[i, j, c])
    np.testing.assert_allclose(
        found("scatter_nd", data=data, indices=index, updates=updates, mode=mode), wanted, rtol=1e-5
    )


def test_scalars() -> None:
    got = found("gather", x=X, indices=np.int32(1), axis=1)
    assert got.shape == (2, 4)
    assert (got == X[:, 1]).all()
    one = found("gather", x=np.array([5, 6]), indices=np.int32(1))
    assert one.shape == ()
    assert one == 6
    assert found("concat", values=[np.array(3), np.array(4)], axis=0).tolist() == [3, 4]
    assert found("matmul", x=np.array([1, 2]), y=np.array([0.5, 0.25], np.float32)).tolist() == 1


def test_a_zero_in_a_shape_counts_from_the_last_axis() -> None:
    # The example of coremltools' documentation (iOS17/tensor_transformation.py).
    assert found("reshape", x=normal(2, 50), shape=[1, 0, -1, 0]).shape == (1, 1, 2, 50)
    assert found("reshape", x=normal(2, 6), shape=[0, 2, -1]).shape == (1, 2, 6)
    assert found("reshape", x=X, shape=[0, -1]).shape == (3, 8)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize(("mode", "numpy"), [("reflect", "reflect"), ("replicate", "edge")])
def test_padding_with_what_is_there(mode: str, numpy: Any, shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    around = [(0, 0)] * (len(shape) - 1) + [(2, 3)]
    got = found("pad", x=x, pad=[2, 3], mode=mode)
    assert (got == np.pad(x, around, mode=numpy)).all()
    if len(shape) > 1:
        around[-2] = (1, 0)
        assert (found("pad", x=x, pad=[1, 0, 2, 3], mode=mode) == np.pad(x, around, mode=numpy)).all()
    with pytest.raises(Unsupported, match="longer than what it mirrors"):
        found("pad", x=x, pad=[x.shape[-1], 0], mode="reflect")


def test_indices_outside_are_refused() -> None:
    for index in (-1, 3):
        with pytest.raises(Unsupported, match="outside of the 3 places"):
            found("scatter", data=normal(3, 2), indices=np.array([index]), updates=normal(1, 2), validate_indices=False)
    with pytest.raises(Unsupported, match="outside of the 3 places"):
        found("gather", x=X, indices=np.array([3]), axis=1)


def test_indices_may_count_from_the_end() -> None:
    got = found("scatter", data=np.zeros((3, 2), np.float32), indices=np.array([-1]), updates=normal(1, 2) * 0 + 1)
    assert got.tolist() == [[0, 0], [0, 0], [1, 1]]
    assert (found("gather", x=X, indices=np.array([-1]), axis=1) == X[:, -1:]).all()


def test_norms_over_channels() -> None:
    image = normal(2, 3, 4, 5)
    mean, variance = image.mean((0, 2, 3)), image.var((0, 2, 3))
    shape = (1, 3, 1, 1)
    batch = found("batch_norm", x=image, mean=mean, variance=variance, epsilon=np.float32(1e-3))
    want = (image - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + 1e-3)
    np.testing.assert_allclose(batch, want, rtol=1e-4, atol=1e-5)
    gamma, beta = normal(3), normal(3)
    for x in (image, image[..., 0], image[..., :1, :1]):
        over, along = tuple(range(2, x.ndim)), (1, 3, *[1] * (x.ndim - 2))
        want = (x - x.mean(over, keepdims=True)) / np.sqrt(x.var(over, keepdims=True) + 1e-5)
        got = found("instance_norm", x=x, gamma=gamma, beta=beta)
        np.testing.assert_allclose(got, want * gamma.reshape(along) + beta.reshape(along), rtol=1e-3, atol=1e-4)


def test_local_response_norm() -> None:
    # coremltools' test of MIL (iOS14/test_normalization.py): of three axes, the first are the channels.
    one = np.array([[[1.0, -7.0], [5.0, -6.0], [-3.0, -5.0]]], np.float32)
    two = [[[0.99996257, -6.98716545], [4.99531746, -5.99191284], [-2.99898791, -4.99531746]]]
    three = [[[0.99997497, -6.99143696], [4.99687672, -5.99460602], [-2.99932504, -4.99687672]]]
    np.testing.assert_allclose(found("local_response_norm", x=one, size=2), two, rtol=1e-6)
    np.testing.assert_allclose(found("local_response_norm", x=one, size=3), three, rtol=1e-6)
    settings = {"alpha": np.float32(0.5), "beta": np.float32(0.6), "k": np.float32(2)}
    for shape in ((2, 6, 3, 2), (2, 6, 3, 2, 2)):
        x = normal(*shape)
        got = found("local_response_norm", x=x, size=3, **settings)
        for n, c, *d in places(x.shape):
            around = x[(n, slice(max(0, c - 1), c + 2), *d)]
            want = x[(n, c, *d)] / (2 + 0.5 / 3 * (around**2).sum()) ** 0.6
            np.testing.assert_allclose(got[(n, c, *d)], want, rtol=1e-4)
        even = F.local_response_norm(torch.from_numpy(x), 4, 0.5, 0.6, 2)
        np.testing.assert_allclose(found("local_response_norm", x=x, size=4, **settings), even.numpy(), rtol=1e-4)


def padding(
    pad_type: str, sizes: tuple[int, ...], kernel: list[int], strides: list[int], pad: list[int]
) -> list[list[int]]:
    """Before and after each axis, by the documentation of conv."""
    if pad_type == "custom":
        return [pad[2 * i : 2 * i + 2] for i in range(len(sizes))]
    if pad_type == "valid":
        return [[0, 0] for _ in sizes]
    result = []
    for size, reach, step in zip(sizes, kernel, strides, strict=True):
        total = max(0, step * math.ceil(size / step) - size + reach - step)
        result.append([total // 2, total - total // 2] if pad_type == "same" else [total - total // 2, total // 2])
    return result


@pytest.mark.parametrize("pad_type", ["valid", "same", "same_lower", "custom"])
@pytest.mark.parametrize(("sizes", "kernel"), [((7,), (3,)), ((6, 5), (2, 3)), ((4, 3, 5), (2, 2, 1))])
def test_convolution(pad_type: str, sizes: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    rank = len(sizes)
    x, weight, bias = normal(2, 4, *sizes), normal(6, 2, *kernel), normal(6)
    strides, dilations, pad = [2, 1, 1][:rank], [1, 2, 1][:rank], [1, 0, 2, 1, 0, 1][: 2 * rank]
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    padded = np.pad(x, [[0, 0], [0, 0], *padding(pad_type, sizes, reach, strides, pad)])
    out = [(padded.shape[2 + i] - reach[i]) // strides[i] + 1 for i in range(rank)]
    want = np.zeros((2, 6, *out), np.float32)
    for at in places(tuple(out)):
        window = padded[
            (
                slice(None),
                slice(None),
                *[slice(at[i] * strides[i], at[i] * strides[i] + reach[i], dilations[i]) for i in range(rank)],
            )
        ]
        for c in range(6):
            group = window[:, 0:2] if c < 3 else window[:, 2:4]
            want[(slice(None), c, *at)] = (group * weight[c]).reshape(2, -1).sum(1) + bias[c]
    inputs = {"strides": strides, "dilations": dilations, "groups": 2, "pad_type": pad_type}
    inputs |= {"pad": pad} if pad_type == "custom" else {}
    np.testing.assert_allclose(found("conv", x=x, weight=weight, bias=bias, **inputs), want, rtol=1e-4, atol=1e-5)


def test_an_even_kernel_pads_after_or_before() -> None:
    image = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
    kernel = np.array([[[1.0, 10.0]]], np.float32)
    assert found("conv", x=image, weight=kernel, pad_type="same").ravel().tolist() == [10, 21, 32, 3]
    assert found("conv", x=image, weight=kernel, pad_type="same_lower").ravel().tolist() == [0, 10, 21, 32]


@pytest.mark.parametrize("pad_type", ["valid", "same", "custom"])
@pytest.mark.parametrize("more", [0, 1])
def test_transposed_convolution(pad_type: str, more: int) -> None:
    """Every input adds its multiple of the kernel where it stands; padding is cut off, an output_shape cuts the end."""
    x, weight, bias = normal(2, 4, 4, 3), normal(4, 3, 3, 4), normal(6)
    strides, pad = [2, 1], [1, 0, 1, 1]
    whole = np.zeros((2, 6, 3 * 2 + 3, 2 + 4), np.float32)
    for n, c, i, j in places(x.shape):
        first = 0 if c < 2 else 3
        whole[n, first : first + 3, 2 * i : 2 * i + 3, j : j + 4] += x[n, c, i, j] * weight[c]
    size = {"valid": [9, 6], "same": [8, 3], "custom": [8, 4]}[pad_type]
    top, left = {"valid": (0, 0), "same": (0, 1), "custom": (1, 1)}[pad_type]
    size[0] += more
    whole = np.pad(whole, [[0, 0], [0, 0], [0, 2], [0, 2]])
    want = whole[:, :, top : top + size[0], left : left + size[1]] + bias[:, None, None]
    inputs = {"strides": strides, "groups": 2, "pad_type": pad_type}
    inputs |= {"pad": pad} if pad_type == "custom" else {}
    inputs |= {"output_shape": [2, 6, *size]} if more else {}
    got = found("conv_transpose", x=x, weight=weight, bias=bias, **inputs)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["max_pool", "avg_pool", "l2_pool"])
@pytest.mark.parametrize("pad_type", ["valid", "same", "same_lower", "custom"])
def test_pools(kind: str, pad_type: str) -> None:
    x, kernel, strides, pad = normal(2, 3, 6, 7), [3, 2], [2, 3], [1, 0, 1, 1]
    around = padding(pad_type, (6, 7), kernel, strides, pad)
    fill = -np.inf if kind == "max_pool" else 0
    padded = np.pad(x, [[0, 0], [0, 0], *around], constant_values=fill)
    inside = np.pad(np.ones_like(x), [[0, 0], [0, 0], *around])
    out = [(padded.shape[2 + i] - kernel[i]) // strides[i] + 1 for i in range(2)]
    wants = {"": np.zeros((2, 3, *out)), "exclude": np.zeros((2, 3, *out))}
    for n, c, i, j in places((2, 3, *out)):
        at = (n, c, slice(i * 2, i * 2 + 3), slice(j * 3, j * 3 + 2))
        window = padded[at]
        value = {"max_pool": window.max(), "avg_pool": window.sum() / 6, "l2_pool": np.sqrt((window**2).sum())}[kind]
        wants[""][n, c, i, j] = value
        wants["exclude"][n, c, i, j] = window.sum() / inside[at].sum() if kind == "avg_pool" else value
    inputs: dict[str, Any] = {"x": x, "kernel_sizes": kernel, "strides": strides, "pad_type": pad_type}
    inputs |= {"pad": pad} if pad_type == "custom" else {}
    np.testing.assert_allclose(found(kind, **inputs), wants[""], rtol=1e-4, atol=1e-5)
    if kind == "avg_pool":
        got = found(kind, exclude_padding_from_average=True, **inputs)
        np.testing.assert_allclose(got, wants["exclude"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "pad", "count"), [(6, 0, 3), (5, 0, 2), (6, 1, 4), (5, 1, 3), (4, 1, 3), (7, 2, 5)])
def test_a_pool_in_ceil_mode_has_the_windows_that_begin_inside(size: int, pad: int, count: int) -> None:
    x = normal(1, 1, size)
    got = found("max_pool", x=x, kernel_sizes=[3], strides=[2], pad_type="custom", pad=[pad, pad], ceil_mode=True)
    starts = [2 * i - pad for i in range(count)]
    want = [x[0, 0, max(0, start) : start + 3].max() for start in starts]
    assert (got[0, 0] == want).all()


def test_blocks_of_pixels() -> None:
    x = normal(2, 12, 3, 2)
    space, shuffled = found("depth_to_space", x=x, block_size=2), found("pixel_shuffle", x=x, upscale_factor=2)
    for n, c, h, w in places((2, 3, 6, 4)):
        i, j = h % 2, w % 2
        assert space[n, c, h, w] == x[n, (i * 2 + j) * 3 + c, h // 2, w // 2]
        assert shuffled[n, c, h, w] == x[n, c * 4 + i * 2 + j, h // 2, w // 2]
    assert (found("space_to_depth", x=space, block_size=2) == x).all()
    assert (found("pixel_unshuffle", x=shuffled, downscale_factor=2) == x).all()


def test_blocks_into_the_batch() -> None:
    x = normal(2, 3, 5, 4)
    got = found("space_to_batch", x=x, block_shape=[2, 3], paddings=np.array([[1, 0], [0, 2]]))
    padded = np.pad(x, [[0, 0], [0, 0], [1, 0], [0, 2]])
    assert got.shape == (12, 3, 3, 2)
    for n, c, h, w in places(got.shape):
        i, j = divmod(n // 2, 3)
        assert got[n, c, h, w] == padded[n % 2, c, h * 2 + i, w * 3 + j]
    back = found("batch_to_space", x=got, block_shape=[2, 3], crops=np.array([[1, 0], [0, 2]]))
    assert (back == x).all()


def test_crop() -> None:
    x = normal(2, 3, 5, 6)
    assert (found("crop", x=x, crop_height=[1, 2], crop_width=[0, 3]) == x[..., 1:3, :3]).all()


# The grid points of [0, 1] that coremltools' documentation lists.
POINTS = {
    ("DEFAULT", 5): [0, 0.4, 0.8, 1, 1],
    ("STRICT_ALIGN_CORNERS", 5): [0, 0.25, 0.5, 0.75, 1],
    ("ALIGN_CORNERS", 6): [0, 0.2, 0.4, 0.6, 0.8, 1],
    ("ALIGN_CORNERS", 1): [0.5],
    ("OFFSET_CORNERS", 5): [0.1, 0.3, 0.5, 0.7, 0.9],
    ("UNALIGN_CORNERS", 5): [0, 0.1, 0.5, 0.9, 1],
}


@pytest.mark.parametrize(("mode", "count"), POINTS)
def test_bilinear_resizing(mode: str, count: int) -> None:
    x = np.array([[[0.0, 1.0], [10.0, 11.0]]], np.float32)
    got = found("resize_bilinear", x=x, target_size_height=count, target_size_width=count, sampling_mode=mode)
    points = np.array(POINTS[mode, count])
    np.testing.assert_allclose(got[0], points[:, None] * 10 + points, atol=1e-5)
    if mode in ("STRICT_ALIGN_CORNERS", "UNALIGN_CORNERS"):
        align = mode == "STRICT_ALIGN_CORNERS"
        factors = {"scale_factor_height": np.float32(count / 2), "scale_factor_width": np.float32(count / 2)}
        np.testing.assert_allclose(found("upsample_bilinear", x=x, align_corners=align, **factors), got, atol=1e-6)


def test_nearest_pixels() -> None:
    x = normal(2, 3, 2)
    got = found("upsample_nearest_neighbor", x=x, scale_factor_height=2, scale_factor_width=3)
    assert (got == np.repeat(np.repeat(x, 2, 1), 3, 2)).all()
    assert (found("resize_nearest_neighbor", x=x, target_size_height=6, target_size_width=6) == got).all()
    uneven = found("resize_nearest_neighbor", x=x, target_size_height=4, target_size_width=1)
    assert (uneven == x[:, [0, 0, 1, 2], :1]).all()
    # Half a pixel is nowhere documented.
    with pytest.raises(Unsupported, match="two pixels at the same distance"):
        found("resize", x=x, shape=[4, 4], resized_dims=2, interpolation_mode="NEAREST_NEIGHBOR")


def test_attention_ignores_what_is_masked_with_minus_infinity() -> None:
    mask = np.where(np.tri(3), 0, -math.inf).astype(np.float32)[None]
    value = normal(2, 3, 4)
    got = found("scaled_dot_product_attention", query=X, key=normal(2, 3, 4), value=value, attn_mask=mask)
    np.testing.assert_allclose(got[:, 0], value[:, 0], rtol=1e-5)


def test_an_update_that_runs_backwards() -> None:
    wanted, update = X.copy(), normal(3, 2)
    wanted[1, ::-1, 3:1:-1] = update
    masks = {"begin_mask": [False, True, False], "end_mask": [False, True, False], "squeeze_mask": [True, False, False]}
    got = found("slice_update", x=X, update=update, begin=[1, 0, 3], end=[2, 0, 1], stride=[1, -1, -1], **masks)
    assert (got == wanted).all()


def test_a_matrix_of_any_tensor() -> None:
    for axis, shape in ((0, (1, 24)), (1, (2, 12)), (3, (24, 1)), (-3, (1, 24)), (-1, (6, 4))):
        assert found("flatten2d", x=X, axis=axis).shape == shape


def test_what_is_not_documented_is_refused() -> None:
    with pytest.raises(Unsupported, match="ceil_mode"):
        found("avg_pool", x=X, kernel_sizes=[2], ceil_mode=True)
