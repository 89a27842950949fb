"""Safetensors: what is written is read back, by us and by the library; lying files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import INDEX_NAME, Entry, MappedTensor, ShardedWriter, read_file, read_folder
from gemexport.formats.tensor import from_bf16, to_bf16


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 9)), min_size=1, max_size=5),
    step=st.integers(1, 4),
    shard=st.sampled_from([40, 200, 10**6]),
)
def test_streamed_slices_come_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], step: int, shard: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    generator = np.random.Generator(np.random.PCG64(0))
    arrays = {f"t{i}": generator.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}
    entries = [Entry(name, "F32", array.shape) for name, array in arrays.items()]
    with ShardedWriter(folder, entries, max_shard_bytes=shard) as writer:
        for name, array in arrays.items():
            for start in range(0, array.shape[0], step):
                writer.write(name, array[start : start + step])
    found = read_folder(folder)
    assert {name: stored.array.tobytes() for name, stored in found.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }
    for name, array in arrays.items():
        for start in range(0, array.shape[0], step):
            assert np.array_equal(found[name].read(start, start + step), array[start : start + step])
    for file in folder.glob("*.safetensors"):
        assert all(np.array_equal(value, arrays[name]) for name, value in load_file(file).items())


def test_bf16_is_read_as_its_values(tmp_path: Path) -> None:
    values = np.array([[1.5, -2.0], [3.0e-30, 0.0]], dtype=np.float32)
    with ShardedWriter(tmp_path, [Entry("w", "BF16", (2, 2))]) as writer:
        writer.write("w", to_bf16(values))
    tensor = MappedTensor(read_folder(tmp_path)["w"])
    assert np.array_equal(tensor.rows(0, 2).values, from_bf16(to_bf16(values)))
    assert tensor.dtype == "bf16"


def test_a_tensor_that_was_not_written_whole_is_an_error(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, [Entry("a", "F32", (2, 2)), Entry("b", "F32", (1,))])
    with pytest.raises(ValueError, match="not written whole"), writer:
        writer.write("a", np.zeros((2, 2), np.float32))


def write(path: Path, header: dict[str, object], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 64]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}},
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        },
        {"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
    ],
    ids=["past the end", "gap", "overlap", "shape", "backwards"],
)
def test_lying_offsets_are_refused(tmp_path: Path, header: dict[str, object]) -> None:
    path = tmp_path / "model.safetensors"
    write(path, header, bytes(24))
    with pytest.raises(InputError, match=r"model\.safetensors: is not a whole safetensors file"):
        read_file(path)


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_truncated_files_are_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(16))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        read_file(path)


@pytest.mark.parametrize(
    ("shard", "problem"),
    [("model-2.safetensors", "which is missing"), ("../outside.safetensors", "outside the folder")],
)
def test_an_index_may_name_only_shards_that_lie_beside_it(tmp_path: Path, shard: str, problem: str) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(InputError, match=problem):
        read_folder(tmp_path)


def test_a_tensor_that_the_index_puts_elsewhere_is_named(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(16))
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(InputError, match="has no tensor b"):
        read_folder(tmp_path)
