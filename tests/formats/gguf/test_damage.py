"""Damaged GGUF models: one line that says what is wrong, or a model; nothing else comes out, whatever the damage."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemexport import demo
from gemexport.exporters import gguf as exporter
from gemexport.exporters.gguf.facts import metadata
from gemexport.exporters.gguf.tokenizer import tokenizer
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.gguf.container import Container, Value, Writer, boolean, float32, int32, read, string, uint32
from gemexport.formats.gguf.vocabulary import MAX_TOKEN_BYTES
from gemexport.formats.storage.errors import InputError

SMALL = demo.Size(vocab=512, hidden=32, intermediate=32, heads=1, kv_heads=1, head_dim=32, per_layer=32, window=8)


class Sample:
    """A small file, and what it is made of."""

    def __init__(self, folder: Path, family: demo.FamilyName) -> None:
        checkpoint = open_checkpoint(demo.make(folder / "model", family=family, size=SMALL))
        self.path = exporter.export(checkpoint, folder / "model.gguf", variant="BF16").path
        self.values = metadata(checkpoint.model, "model", "BF16") | tokenizer(checkpoint)[0]
        self.container: Container = read(self.path)
        self.data = self.path.read_bytes()
        self.header = min(item.offset for item in self.container.tensors.values())

    def write(
        self,
        path: Path,
        values: dict[str, Value],
        change: Callable[[dict[str, tuple[Type, np.ndarray]]], object] = lambda arrays: None,
    ) -> Path:
        """The same file with other metadata and tensors; an array is rows of bytes, for the shape its type gives."""
        arrays: dict[str, tuple[Type, np.ndarray]] = {}
        for name, item in self.container.tensors.items():
            rows = self.container.rows(item, 0, item.nbytes // item.row_bytes)
            numbers = rows.view("<f4" if item.type == Type.F32 else "<u2").reshape(item.shape)
            arrays[name] = item.type, numbers
        change(arrays)
        with Writer(path, values, {name: numbers.shape for name, (_, numbers) in arrays.items()}) as out:
            for name, (kind, numbers) in arrays.items():
                out.write(name, kind, numbers)
        return path


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample(tmp_path_factory.mktemp("damage"), request.param)


def complaint(path: Path, damage: ModuleType) -> str:
    """What an InputError says of a file; nothing when it can be read. Anything else that is raised fails the test."""
    return str(damage.complaint(damage.Sample(path, damage.read_model), path))


extremes = st.sampled_from([0, 1, 7, 8, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])


words = st.text(max_size=6)
numbers = st.integers(-(1 << 31), (1 << 31) - 1)
floats = st.floats(width=32)
others = st.one_of(
    extremes.map(lambda number: uint32(number & 0xFFFFFFFF)),
    numbers.map(int32),
    floats.map(float32),
    st.booleans().map(boolean),
    words.map(string),
    st.sampled_from(["llama", "gemma4", "gpt2", "linear", "yarn", "gemma3"]).map(string),
    st.lists(numbers, max_size=9).map(int32),
    st.lists(floats, max_size=9).map(float32),
    st.lists(st.booleans(), max_size=9).map(boolean),
    st.lists(words, max_size=9).map(string),
)


def edited(data: st.DataObject, value: Value) -> Value:
    """An array with some of its items replaced by others of its type, or cut short."""
    items = list(value.value)
    inside = {str: words, bool: st.booleans(), int: st.integers(0, (1 << 31) - 1), float: floats}[type(items[0])]
    for _ in range(data.draw(st.integers(1, 4))):
        items[data.draw(st.integers(0, len(items) - 1))] = data.draw(inside | st.sampled_from(items))
    return Value(value.type, items[: data.draw(st.sampled_from([len(items), len(items), len(items) - 1, 0]))])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_other_metadata(sample: Sample, damage: ModuleType, data: st.DataObject) -> None:
    """A whole file whose metadata lie: keys missing, of other types and sizes, arrays with other items."""
    values = dict(sample.values)
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(sorted(values)))
        kind = data.draw(st.sampled_from(["remove", "replace", "replace", "edit"]))
        if kind == "remove":
            del values[key]
        elif kind == "edit" and isinstance(values[key].value, list) and values[key].value:
            values[key] = edited(data, values[key])
        else:
            values[key] = data.draw(others)
    with tempfile.TemporaryDirectory() as folder:
        complaint(sample.write(Path(folder) / "lies.gguf", values), damage)


def set_key(key: str, value: Value | None) -> Callable[[dict[str, Value], dict[str, Any]], object]:
    def change(values: dict[str, Value], _: dict[str, Any]) -> None:
        name = key.format(arch=values["general.architecture"].value)
        if value is None:
            del values[name]
        else:
            values[name] = value

    return change


def drop(name: str) -> Callable[[dict[str, Value], dict[str, Any]], object]:
    return lambda _, arrays: arrays.pop(name)


def reshape(name: str, *shape: int) -> Callable[[dict[str, Value], dict[str, Any]], object]:
    def change(_: dict[str, Value], arrays: dict[str, tuple[Type, np.ndarray]]) -> None:
        arrays[name] = Type.F32, np.ones(shape, np.float32)

    return change


LIES: dict[str, tuple[Callable[[dict[str, Value], dict[str, Any]], object], str]] = {
    "missing tensor": (drop("blk.1.ffn_up.weight"), "the tensor model.layers.1.mlp.up_proj.weight is missing"),
    "no embedding": (drop("token_embd.weight"), "there is no matrix token_embd.weight"),
    "wrong shape": (reshape("blk.1.ffn_up.weight", 32, 64), "has the shape [32, 64] where the metadata say"),
    "a matrix that is none": (reshape("token_embd.weight", 512, 4, 8), "there is no matrix token_embd.weight"),
    "second scale": (reshape("blk.0.ffn_up.scale", 1), "has another scale beside its blocks"),
    "too many layers": (set_key("{arch}.block_count", uint32(9999)), "says that it has 9999 layers"),
    "heads": (set_key("{arch}.attention.head_count", uint32(3)), "has the shape"),
    "no width": (set_key("{arch}.embedding_length", None), "embedding_length is None and should be a whole number"),
    "width in words": (set_key("{arch}.embedding_length", string("wide")), "embedding_length is 'wide'"),
    "epsilon": (
        set_key("{arch}.attention.layer_norm_rms_epsilon", float32(float("nan"))),
        "layer_norm_rms_epsilon is nan and should be a number",
    ),
    "fewer tokens": (
        set_key("tokenizer.ggml.tokens", string(["a"])),
        "should be 512 tokens, the rows of the embedding",
    ),
    "token types": (set_key("tokenizer.ggml.token_type", int32([1] * 511)), "should be 512 token types"),
    "another tokenizer": (
        set_key("tokenizer.ggml.model", string("gpt2")),
        "its tokenizer (gpt2) is not one of Gemma's",
    ),
    "no tokenizer": (set_key("tokenizer.ggml.model", None), "tokenizer.ggml.model is None and should be a text"),
    "long token": (
        set_key("tokenizer.ggml.tokens", string(["x" * (MAX_TOKEN_BYTES + 1)] * 512)),
        f"token 0 has more than {MAX_TOKEN_BYTES} bytes",
    ),
    "unknown architecture": (set_key("general.architecture", string("llama")), "the architecture 'llama' is not known"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named(lie: str, sample: Sample, damage: ModuleType, tmp_path: Path) -> None:
    change, problem = LIES[lie]
    values = dict(sample.values)
    path = sample.write(tmp_path / "lies.gguf", values, lambda arrays: change(values, arrays))
    assert problem in complaint(path, damage)


@pytest.mark.parametrize(
    ("merge", "kind"), [("nothing else", "gemma4"), ("ab", "gemma4"), ("", "gemma4"), (" ", "gemma4")]
)
def test_merges_of_what_is_no_token(merge: str, kind: str, sample: Sample, damage: ModuleType, tmp_path: Path) -> None:
    values = dict(sample.values) | {"tokenizer.ggml.model": string(kind), "tokenizer.ggml.merges": string([merge])}
    path = sample.write(tmp_path / "merges.gguf", values)
    assert "merge 0 is not of two tokens that make a third" in complaint(path, damage)


def test_a_frequency_table_of_another_rope(sample: Sample, damage: ModuleType, tmp_path: Path) -> None:
    if "rope_freqs.weight" not in sample.container.tensors:
        pytest.skip("Gemma 3 has none")
    for numbers, problem in (
        (np.array([1, 2, 4] + [1e30] * 13, np.float32), "is not of proportional RoPE"),
        (np.array([1, 1e30] * 8, np.float32), "is not of proportional RoPE"),
        (np.full(32, np.nan, np.float32), "is not of proportional RoPE"),
        (np.ones(7, np.float32), "should be F32 [32]"),
    ):
        numbers = np.resize(numbers, 32) if numbers.size != 7 else numbers
        path = sample.write(
            tmp_path / "rope.gguf",
            sample.values,
            lambda arrays, numbers=numbers: arrays.update({"rope_freqs.weight": (Type.F32, numbers)}),
        )
        assert problem in complaint(path, damage)


@pytest.mark.parametrize("count", [(1 << 16) + 1, 1 << 40])
def test_counts_that_would_take_memory_are_refused_at_once(count: int, sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "counts.gguf"
    for place in (8, 16):
        data = bytearray(sample.data)
        data[place : place + 8] = count.to_bytes(8, "little")
        path.write_bytes(data)
        with pytest.raises(InputError, match="is not a whole GGUF file"):
            open_checkpoint(path)


def test_a_key_that_is_there_twice_is_refused(sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "twice.gguf"
    data = sample.data.replace(b"general.type", b"general.name", 1)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"the key general\.name is there twice"):
        open_checkpoint(path)
