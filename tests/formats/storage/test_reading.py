"""Files that are none, too large, or of another encoding are told apart before anything is read of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gemexport.formats.storage import reading
from gemexport.formats.storage.errors import InputError


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def circle(path: Path) -> None:
    path.symlink_to(path)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


KINDS = [
    (fifo, "is a FIFO and should be a file"),
    (device, "is a device and should be a file"),
    (Path.mkdir, "is a folder and should be a file"),
    (circle, "cannot be read"),
    (dangling, "is a link to nothing"),
]


@pytest.mark.parametrize(("make", "problem"), KINDS)
@pytest.mark.parametrize("read", [reading.regular, reading.opened, reading.read_json, reading.read_text])
def test_what_is_no_file(make: object, problem: str, read: object, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    make(path)  # type: ignore[operator]
    with pytest.raises(InputError, match=problem):
        read(path)  # type: ignore[operator]


def test_nothing_is_not_a_fault_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        reading.read_json(tmp_path / "config.json")
    assert reading.read_optional_json(tmp_path / "config.json") == {}


def test_a_file_larger_than_its_kind_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.touch()
    os.truncate(path, 1 << 40)  # no block of it is on the disk
    with pytest.raises(InputError, match="has 1099511627776 bytes, more than the"):
        reading.read_text(path)
    assert reading.regular(path) == 1 << 40


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[" * (reading.MAX_CONTAINERS + 1), "lists and objects in it"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[]", "is not a JSON object"),
        (b"{", "cannot be read as JSON"),
        (b'{"a": "\xff"}', "cannot be read as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    ],
)
def test_json_that_is_no_object(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem):
        reading.read_json(path)


def test_a_copy_is_the_file(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(os.urandom(3 << 20))
    reading.copy(source, target)
    assert target.read_bytes() == source.read_bytes()
