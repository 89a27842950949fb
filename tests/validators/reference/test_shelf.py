"""Tensors that wait on disk, and a disk that has no room for them."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from gemexport.formats.storage.errors import PlaceError  # noqa: E402
from gemexport.validators.reference.shelf import Shelf  # noqa: E402


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files of 64 kB at most; Python does not let the signal end the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_put_comes_back_in_its_dtype_and_strides(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    turned = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T
    shelf.put("hidden-0", turned, None)
    found, nothing = shelf.get("hidden-0")
    assert torch.equal(found, turned)
    assert (found.dtype, found.stride(), nothing) == (turned.dtype, turned.stride(), None)
    shelf.drop("hidden-0")
    assert shelf.get("hidden-0") == []


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("size", [1 << 15, 1 << 20])
def test_a_place_without_room_is_told_as_such(size: int, tmp_path: Path) -> None:
    """torch says `basic_ios::clear: iostream error`, or that a position is not the one that it expected."""
    shelf = Shelf(tmp_path)
    shelf.put("fits", torch.zeros(100))
    with pytest.raises(PlaceError, match="hidden-1: is larger than a file may be here"):
        shelf.put("hidden-1", torch.zeros(size))
    assert torch.equal(shelf.get("fits")[0], torch.zeros(100))
