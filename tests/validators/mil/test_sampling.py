"""Sampling between pixels against PyTorch's `grid_sample` and `interpolate`, and the numbers of coremltools' tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gemexport.validators.mil.evaluator  # noqa: F401  (registers the operations)
from gemexport.validators.mil.registry import OPERATIONS, Unsupported

IMAGE = torch.arange(1.0, 17).reshape(1, 1, 4, 4)


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("sampling", ["bilinear", "nearest"])
@pytest.mark.parametrize(
    ("padding", "torchs"), [("constant", "zeros"), ("border", "border"), ("reflection", "reflection")]
)
def test_resample_is_grid_sample(padding: str, torchs: str, sampling: str, align: bool) -> None:
    torch.manual_seed(1)
    x, places = torch.randn(2, 3, 5, 4), 3 * torch.rand(2, 6, 7, 2) - 1.5
    if padding == "reflection" and not align:
        padding = "symmetric"  # PyTorch's mirror then stands at the edges of the pixels
    wanted = F.grid_sample(x, places, mode=sampling, padding_mode=torchs, align_corners=align)
    given = {"sampling_mode": sampling, "padding_mode": padding, "padding_value": 0.0, "align_corners": align}
    got = OPERATIONS["resample"](x=x, coordinates=places, coordinates_mode="normalized_minus_one_to_one", **given)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    shares = OPERATIONS["resample"](
        x=x, coordinates=(places + 1) / 2, coordinates_mode="normalized_zero_to_one", **given
    )
    torch.testing.assert_close(shares, wanted, rtol=1e-3, atol=1e-4)


def test_resample_outside_of_the_image() -> None:
    """The numbers of coremltools' own test (iOS15/test_image_resizing.py)."""
    x = torch.tensor([11.0, 22, 33, 44]).reshape(1, 1, 2, 2)
    places = torch.tensor([-1.0, -2, -3.7, -1, 0, 0, 3.5, 1.2]).reshape(1, 2, 2, 2)

    def sampled(sampling: str, padding: str, value: float, mode: str, align: bool) -> list[float]:
        found: torch.Tensor = OPERATIONS["resample"](x, places, sampling, padding, value, mode, align)
        return found.reshape(-1).tolist()

    constant = sampled("bilinear", "constant", 6.17, "normalized_minus_one_to_one", True)
    np.testing.assert_allclose(constant, [8.585, 6.17, 27.5, 6.17], rtol=1e-6)
    assert sampled("nearest", "border", -1, "unnormalized", False) == [11, 11, 11, 44]
    mirrored = sampled("bilinear", "reflection", -1, "normalized_zero_to_one", True)
    np.testing.assert_allclose(mirrored, [22, 36.3, 11, 34.1], rtol=1e-6)
    assert sampled("nearest", "symmetric", -1, "normalized_zero_to_one", False) == [22, 33, 11, 33]
    with pytest.raises(Unsupported, match="padding mode wrap"):
        sampled("nearest", "wrap", -1, "unnormalized", True)
    with pytest.raises(Unsupported, match="coordinates mode inches"):
        sampled("nearest", "border", -1, "inches", True)


def test_affine_is_a_grid_of_resample() -> None:
    torch.manual_seed(2)
    x, matrix = torch.randn(2, 3, 4, 5), torch.randn(2, 6)
    grid = F.affine_grid(matrix.reshape(2, 2, 3), [2, 3, 6, 7], align_corners=True)
    wanted = F.grid_sample(x, grid, align_corners=True)
    mode = "normalized_minus_one_to_one"
    got = OPERATIONS["affine"](x, matrix, 6, 7, "bilinear", "constant", 0.0, mode, True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    same = OPERATIONS["affine"](x, matrix[:1], 6, 7, "bilinear", "constant", 0.0, mode, True)
    torch.testing.assert_close(same[0], wanted[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(Unsupported, match="corners at -1 and 1"):
        OPERATIONS["affine"](x, matrix, 6, 7, "bilinear", "constant", 0.0, mode, False)


def test_resize() -> None:
    x = torch.randn(2, 3, 4, 5)
    wanted = F.interpolate(x, (7, 3), mode="bilinear", align_corners=True)
    got = OPERATIONS["resize"](x, torch.tensor([9, 7, 3]), 2, "LINEAR", "STRICT_ALIGN_CORNERS")
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    # A zero keeps a size, wherever it stands among the last.
    kept = OPERATIONS["resize"](x, torch.tensor([0, 3]), 2, "LINEAR", "STRICT_ALIGN_CORNERS")
    torch.testing.assert_close(kept, F.interpolate(x, (4, 3), mode="bilinear", align_corners=True))
    # The numbers of coremltools' own test (iOS17/test_image_resizing.py).
    pair = torch.tensor([[-6.174], [9.371]])[None]
    near = OPERATIONS["resize"](pair, torch.tensor([1, 3, 2]), 2, "NEAREST_NEIGHBOR", "DEFAULT")
    assert near.tolist() == [[[pair[0, 0, 0]] * 2, [pair[0, 1, 0]] * 2, [pair[0, 1, 0]] * 2]]
    with pytest.raises(Unsupported, match="sampling mode CUBIC"):
        OPERATIONS["resize"](x, torch.tensor([7, 3]), 2, "LINEAR", "CUBIC")


def test_upsampling_by_factors_that_are_no_integers() -> None:
    """The numbers of coremltools' own tests (iOS15 and iOS16, test_image_resizing.py)."""
    x = torch.tensor([1.5, -2.5, 3.5]).reshape(1, 1, 1, 3)
    near = OPERATIONS["upsample_nearest_neighbor"]
    assert near(x, torch.tensor(3.17), torch.tensor(0.67)).tolist() == [[[[1.5, -2.5]] * 3]]
    assert near(x, torch.tensor(2.0), torch.tensor(1.12)).tolist() == [[[[1.5, -2.5, 3.5]] * 2]]
    pair = torch.tensor([1.0, 2]).reshape(1, 1, 1, 2)
    between = OPERATIONS["upsample_bilinear"](pair, 2, 3, align_corners=False, half_pixel_centers=False)
    np.testing.assert_allclose(between[0, 0, 0].numpy(), [1, 4 / 3, 5 / 3, 2, 2, 2], rtol=1e-6)
    with pytest.raises(Unsupported, match="exclude each other"):
        OPERATIONS["upsample_bilinear"](pair, 2, 3, align_corners=True, half_pixel_centers=True)


@pytest.mark.parametrize(
    ("box", "count", "wanted"),
    [
        ([1, 1, 2, 2], 2, [6, 7, 10, 11]),
        ([1, 1, 2, 2], 1, [8.5]),
        ([2, 2, 1, 1], 2, [11, 10, 7, 6]),
        ([-1, 0, 0, 1], 2, [9.5, 9.5, 1, 2]),
    ],
)
def test_boxes(box: list[float], count: int, wanted: list[float]) -> None:
    """The numbers of coremltools' own test (iOS14/test_image_resizing.py), and a box that hangs out of the image."""

    def cropped(**given: Any) -> torch.Tensor:
        sizes = {"target_height": count, "target_width": count, "sampling_mode": "ALIGN_CORNERS", "pad_value": 9.5}
        found: torch.Tensor = OPERATIONS["crop_resize"](IMAGE, **given, **sizes)
        return found

    one = torch.tensor([box], dtype=torch.float32)
    got = cropped(boxes=one)
    assert got.shape == (1, 1, count, count)
    np.testing.assert_allclose(got.reshape(-1).numpy(), wanted)
    indexed = torch.cat([torch.zeros(1, 1), one], 1).reshape(1, 1, 5, 1, 1)
    assert (cropped(roi=indexed)[0] == got).all()
    assert (cropped(roi=one.reshape(1, 1, 4, 1, 1))[0] == got).all()
    shares = cropped(boxes=one / 3, normalized_coordinates=True)
    np.testing.assert_allclose(shares.reshape(-1).numpy(), wanted, rtol=1e-5)
    top, left, bottom, right = box
    centred = torch.tensor([[(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]])
    with pytest.raises(Unsupported, match="UNALIGN_CORNERS"):
        OPERATIONS["crop_resize"](IMAGE, boxes=one, sampling_mode="UNALIGN_CORNERS")
    middle = cropped(boxes=centred, box_coordinate_mode="CENTER_SIZE_WIDTH_FIRST")
    assert (middle == got).all()
