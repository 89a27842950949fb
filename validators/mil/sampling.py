"""MIL operations that sample images `[…, height, width]` where no pixel need be: other sizes, boxes, coordinates.

Each says what coremltools' reference of its name says (coremltools.converters.mil.mil.ops.defs, image_resizing.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gemexport.validators.mil.registry import Unsupported, flag, integer, integers, number, op


def _grid(size: Tensor | int, count: int, mode: str) -> Tensor:
    """Where along an axis of `size` the `count` samples lie, float64, for resize_bilinear's sampling modes.

    Sizes `[n]` give `[n, count]`.
    """
    steps = torch.arange(count, dtype=torch.float64)
    reach = torch.as_tensor(size, dtype=torch.float64).unsqueeze(-1)
    last = max(count - 1, 1)
    if mode == "ALIGN_CORNERS" and count == 1:
        points = (reach - 1) / 2 + 0 * steps
    elif mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        points = steps * (reach - 1) / last
    elif mode == "DEFAULT":
        points = steps * (reach - reach / count) / last
    elif mode == "OFFSET_CORNERS":
        points = (steps + 0.5) * torch.clamp(reach - 1, min=1) / count
    elif mode == "UNALIGN_CORNERS":
        points = (steps + 0.5) * reach / count - 0.5
    else:
        raise Unsupported(f"the sampling mode {mode} is not documented")
    if isinstance(size, Tensor):  # boxes may have their end before their start: they are not cut
        return points
    return points.clamp(0, size - 1)


def _along(x: Tensor, axis: int, points: Tensor) -> Tensor:
    """`x` sampled linearly at `points` `[count]`, which lie within it, along an axis."""
    below = points.floor().long()
    above = torch.clamp(below + 1, max=x.shape[axis] - 1)
    share = (points - below).float().reshape(-1, *[1] * (x.ndim - 1 - axis % x.ndim))
    low, high = x.index_select(axis, below), x.index_select(axis, above)
    return low + (high - low) * share


def _bilinear(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    rows = _along(x, x.ndim - 2, _grid(x.shape[-2], height, mode))
    return _along(rows, x.ndim - 1, _grid(x.shape[-1], width, mode))


@op("resize_bilinear")
def resize_bilinear(
    x: Tensor, target_size_height: Any = 1, target_size_width: Any = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    return _bilinear(x, integer(target_size_height), integer(target_size_width), sampling_mode)


def _scaled(x: Tensor, height: Any, width: Any) -> tuple[int, int]:
    """The height and width of `x` times factors, rounded down; a factor of float32 may lie a little below its own."""
    sizes = (x.shape[-2] * number(height), x.shape[-1] * number(width))
    whole = [round(size) if math.isclose(size, round(size), rel_tol=1e-6) else math.floor(size) for size in sizes]
    return whole[0], whole[1]


@op("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: Any = 1,
    scale_factor_width: Any = 1,
    align_corners: Any = True,
    half_pixel_centers: Any = None,
) -> Tensor:
    centres = not flag(align_corners) if half_pixel_centers is None else flag(half_pixel_centers)
    if flag(align_corners) and centres:
        raise Unsupported("align_corners and half_pixel_centers exclude each other")
    mode = "STRICT_ALIGN_CORNERS" if flag(align_corners) else "UNALIGN_CORNERS" if centres else "DEFAULT"
    return _bilinear(x, *_scaled(x, scale_factor_height, scale_factor_width), mode)


@op("resize_nearest_neighbor")
def resize_nearest_neighbor(x: Tensor, target_size_height: Any, target_size_width: Any) -> Tensor:
    return _nearest(x, integer(target_size_height), integer(target_size_width))


@op("upsample_nearest_neighbor")
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> Tensor:
    return _nearest(x, *_scaled(x, scale_factor_height, scale_factor_width))


def _nearest(x: Tensor, height: int, width: int) -> Tensor:
    """The pixels at `i * size / count`, rounded down, as coremltools' tests have them for factors that are no integers.

    Theirs are of MIL's own (iOS15/test_image_resizing.py) and of PyTorch's `interpolate`, which says the same.
    """
    for axis, count in ((-2, height), (-1, width)):
        x = x.index_select(axis, torch.arange(count) * x.shape[axis] // count)
    return x


@op("resize")
def resize(
    x: Tensor,
    shape: Tensor,
    resized_dims: Any,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """The last `resized_dims` axes at the last sizes of `shape`; a zero there keeps the size."""
    count = integer(resized_dims)
    for axis, size in zip(range(x.ndim - count, x.ndim), integers(shape)[-count:] if count else (), strict=True):
        points = _grid(x.shape[axis], size or x.shape[axis], sampling_mode)
        if interpolation_mode == "LINEAR":
            x = _along(x, axis, points)
            continue
        if (points - points.floor() == 0.5).any():
            raise Unsupported("which of two pixels at the same distance is the nearest is not documented")
        x = x.index_select(axis, points.round().long())
    return x


def _folded(points: Tensor, low: float, high: float) -> Tensor:
    """`points` mirrored at `low` and `high` until they lie between them."""
    if high <= low:
        return torch.full_like(points, low)
    away = torch.remainder(points - low, 2 * (high - low))
    return torch.minimum(away, 2 * (high - low) - away) + low


def _pixel(image: Tensor, rows: Tensor, columns: Tensor, padding: float) -> Tensor:
    """`[channels, *rows.shape]` of an image `[channels, h, w]`; `padding` where there is no such pixel."""
    height, width = image.shape[-2:]
    there = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    found = image[:, rows.clamp(0, height - 1).long(), columns.clamp(0, width - 1).long()]
    return torch.where(there, found, torch.tensor(padding))


def _sampled(image: Tensor, rows: Tensor, columns: Tensor, padding: float) -> Tensor:
    """Bilinear samples `[channels, *rows.shape]` of an image `[channels, h, w]` that lies in `padding`."""
    top, left = rows.floor(), columns.floor()
    down, right = (rows - top).float(), (columns - left).float()
    upper = _pixel(image, top, left, padding) * (1 - right) + _pixel(image, top, left + 1, padding) * right
    lower = _pixel(image, top + 1, left, padding) * (1 - right) + _pixel(image, top + 1, left + 1, padding) * right
    return upper * (1 - down) + lower * down


def _within(points: Tensor, size: int, mode: str) -> Tensor:
    """`points` along an axis of `size`, moved inside as a padding mode has it; "constant" leaves them."""
    if mode == "constant":
        return points
    if mode == "reflection":
        points = _folded(points, 0, size - 1)
    elif mode == "symmetric":
        points = _folded(points, -0.5, size - 0.5)
    elif mode != "border":
        raise Unsupported(f"the padding mode {mode} is not documented")
    return points.clamp(0, size - 1)


def _unnormalized(points: Tensor, size: int, mode: str, align_corners: bool) -> Tensor:
    """Coordinates of an axis of `size` in pixels."""
    if mode == "unnormalized":
        return points
    if mode not in ("normalized_minus_one_to_one", "normalized_zero_to_one"):
        raise Unsupported(f"the coordinates mode {mode} is not documented")
    share = points if mode == "normalized_zero_to_one" else (points + 1) / 2
    return share * (size - 1) if align_corners else share * size - 0.5


@op("resample")
def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Any,
    coordinates_mode: str,
    align_corners: Any,
) -> Tensor:
    """`x` `[n, c, h, w]` at `coordinates` `[n, h', w', 2]`, each the place along the width, then along the height."""
    height, width = x.shape[-2:]
    columns, rows = coordinates.double().unbind(-1)
    rows = _within(_unnormalized(rows, height, coordinates_mode, flag(align_corners)), height, padding_mode)
    columns = _within(_unnormalized(columns, width, coordinates_mode, flag(align_corners)), width, padding_mode)
    if sampling_mode == "nearest":
        rows, columns = rows.round(), columns.round()
    take = _pixel if sampling_mode == "nearest" else _sampled
    parts = [
        take(image, down, right, number(padding_value)) for image, down, right in zip(x, rows, columns, strict=True)
    ]
    return torch.stack(parts)


@op("affine")
def affine(
    x: Tensor,
    transform_matrix: Tensor,
    output_height: Any,
    output_width: Any,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Any,
    coordinates_mode: str,
    align_corners: Any,
) -> Tensor:
    """`x` `[n, c, h, w]` where `transform_matrix` `[n or 1, 6]` sends the pixels of the output, corners at -1 and 1."""
    if coordinates_mode != "normalized_minus_one_to_one" or not flag(align_corners):
        raise Unsupported("only corners at -1 and 1 are documented")
    rows, columns = (torch.linspace(-1, 1, integer(n), dtype=torch.float64) for n in (output_height, output_width))
    down, right = torch.meshgrid(rows, columns, indexing="ij")
    matrix = transform_matrix.double().reshape(-1, 2, 3, 1, 1)
    places = matrix[:, :, 0] * right + matrix[:, :, 1] * down + matrix[:, :, 2]
    coordinates = places.movedim(1, -1).expand(x.shape[0], *down.shape, 2)
    y: Tensor = resample(x, coordinates, sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners)
    return y


def _corners(boxes: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, bottom and right of boxes `[n, 4]`."""
    first, second, third, fourth = boxes.double().unbind(-1)
    if mode.endswith("WIDTH_FIRST"):
        first, second, third, fourth = second, first, fourth, third
    if mode.startswith("CORNERS"):
        return first, second, third, fourth
    return first - third / 2, second - fourth / 2, first + third / 2, second + fourth / 2


@op("crop_resize")
def crop_resize(
    x: Tensor,
    roi: Tensor | None = None,
    boxes: Tensor | None = None,
    box_indices: Tensor | None = None,
    target_height: Any = 1,
    target_width: Any = 1,
    normalized_coordinates: Any = False,
    spatial_scale: Any = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: Any = 0.0,
) -> Tensor:
    """Boxes of images `[b, c, h, w]`, resized: `[n, c, …]` of `boxes` `[n, 4]`, one image each (iOS 17).

    Of `roi` `[n, 1, 4, 1, 1]` `[n, b, c, …]`, all images each; in one `[n, 1, 5, 1, 1]` the image comes first.
    """
    images: list[list[int]]
    if roi is not None:
        flat = roi.reshape(roi.shape[0], -1)
        boxes = flat[:, -4:]
        images = [[integer(box[0])] if flat.shape[1] == 5 else list(range(x.shape[0])) for box in flat]
    elif boxes is not None:
        images = [[i] for i in (range(len(boxes)) if box_indices is None else integers(box_indices))]
    else:
        raise Unsupported("there are no boxes")
    if sampling_mode == "UNALIGN_CORNERS":
        # coremltools' test of it (iOS15/test_image_resizing.py) has other numbers than resize_bilinear's grid gives.
        raise Unsupported("what UNALIGN_CORNERS takes of a box is not documented")
    height, width = x.shape[-2:]
    scales = (height - 1, width - 1) if flag(normalized_coordinates) else (1, 1)
    top, left, bottom, right = _corners(boxes, box_coordinate_mode)
    found = []
    for start, stop, scale, count in ((top, bottom, scales[0], target_height), (left, right, scales[1], target_width)):
        start, stop = start * scale * number(spatial_scale), stop * scale * number(spatial_scale)
        found.append(start.unsqueeze(-1) + _grid(stop - start + 1, integer(count), sampling_mode))
    parts = []
    for rows, columns, chosen in zip(*found, images, strict=True):
        down, across = torch.meshgrid(rows, columns, indexing="ij")
        outside = (down < 0) | (down > height - 1) | (across < 0) | (across > width - 1)
        crops = [_sampled(x[i], down, across, 0.0).masked_fill(outside, number(pad_value)) for i in chosen]
        parts.append(torch.stack(crops) if roi is not None else crops[0])
    return torch.stack(parts)
