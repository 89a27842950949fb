"""Importance matrices in both layouts, and files that lie."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemexport.formats.gguf.imatrix import read_imatrix
from gemexport.formats.storage.errors import InputError

SUMS = np.float32([2, 4, 6.5, 8])


def write_gguf(path: Path, tensors: dict[str, np.ndarray], chunks: int = 7) -> Path:
    """A GGUF file as llama-imatrix writes it, by the gguf package."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["some text"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy(entries: dict[str, np.ndarray], calls: int = 4, tail: bytes = struct.pack("<ii4s", 9, 4, b"text")) -> bytes:
    """The bytes of the older layout."""
    parts = [struct.pack("<i", len(entries))]
    for name, values in entries.items():
        raw = name.encode()
        parts.append(struct.pack(f"<i{len(raw)}sii", len(raw), raw, calls, values.size) + values.tobytes())
    return b"".join(parts) + tail


def test_gguf_sums_are_divided_by_their_counts(tmp_path: Path) -> None:
    found = read_imatrix(
        write_gguf(
            tmp_path / "i.gguf",
            {
                "blk.0.attn_q.weight.in_sum2": SUMS.reshape(1, -1),
                "blk.0.attn_q.weight.counts": np.float32([[4]]),
                "experts.in_sum2": np.stack([SUMS, SUMS]),
                "experts.counts": np.float32([[2], [0]]),
            },
        )
    )
    assert found.chunks == 7
    assert found.entries["blk.0.attn_q.weight"].tolist() == [0.5, 1, 1.625, 2]
    assert found.entries["experts"].tolist() == [1, 2, 3.25, 4, 1, 1, 1, 1], "an expert that was never used"


@pytest.mark.parametrize(("calls", "expected"), [(4, [0.5, 1, 1.625, 2]), (0, [2, 4, 6.5, 8])])
def test_the_older_layout(calls: int, expected: list[float], tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(legacy({"a": SUMS, "b": SUMS[:1]}, calls))
    found = read_imatrix(path)
    assert found.entries["a"].tolist() == expected
    assert (set(found.entries), found.chunks) == ({"a", "b"}, 9)
    path.write_bytes(legacy({"a": SUMS}, tail=b""))
    assert read_imatrix(path).chunks == 0


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"a.in_sum2": SUMS}, "counts of a"),
        ({"a.in_sum2": SUMS, "a.counts": np.ones(3, np.float32)}, "counts of a"),
        ({"a.in_sum2": SUMS.astype(np.float16), "a.counts": np.ones(1, np.float32)}, "F16"),
        ({"a.in_sum2": SUMS * np.float32(np.nan), "a.counts": np.ones(1, np.float32)}, "not finite"),
        ({"token_embd.weight": SUMS}, "no importance matrix"),
    ],
)
def test_gguf_files_that_are_none_are_refused(tensors: dict[str, np.ndarray], problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem):
        read_imatrix(write_gguf(tmp_path / "i.gguf", tensors))


@pytest.mark.parametrize("data", [b"", b"\0" * 4, b"\x01", b"\xff" * 64, legacy({"a": SUMS}, tail=b"")[:-3]])
def test_bytes_that_are_none_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"i\.dat"):
        read_imatrix(path)
    with pytest.raises(InputError, match="is a folder and should be a file"):
        read_imatrix(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, len(legacy({"blk.0.attn_q.weight": SUMS, "b": SUMS})) - 1), byte=st.integers(0, 255))
def test_no_changed_byte_crashes_the_reader(position: int, byte: int, tmp_path: Path) -> None:
    whole = legacy({"blk.0.attn_q.weight": SUMS, "b": SUMS})
    path = tmp_path / "fuzzed.dat"
    path.write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
    with suppress(InputError):
        assert read_imatrix(path).entries
