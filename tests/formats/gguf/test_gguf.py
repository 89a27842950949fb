"""The GGUF container and its blocks: against the `gguf` package, and against files that lie."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf import quants as reference
from gguf.constants import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from gemexport.formats import gguf
from gemexport.formats.gemma.families.gemma3 import Gemma3
from gemexport.formats.gguf.blocks import (
    half,
    pack_q4_0,
    pack_q8_0,
    quantize_q8_0,
    unpack_q4_0,
    unpack_q8_0,
)
from gemexport.formats.gguf.container import Writer, boolean, float32, int32, read, string, uint32
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import expand, to_bf16

shapes = st.tuples(st.integers(1, 5), st.integers(1, 4))
seeds = st.integers(0, 2**32 - 1)


def _grid(seed: int, rows: int, blocks: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    stream = np.random.default_rng(seed)
    codes = stream.integers(low, high, (rows, blocks * 32), endpoint=True).astype(np.int8)
    scales = stream.standard_normal((rows, blocks)).astype(np.float16)
    return codes, scales


@given(shapes, seeds)
def test_q4_0_returns_what_was_packed_and_means_what_ggml_reads(shape: tuple[int, int], seed: int) -> None:
    codes, scales = _grid(seed, *shape, -8, 7)
    data = pack_q4_0(codes, scales)
    found_codes, found_scales = unpack_q4_0(data)
    assert np.array_equal(found_codes, codes)
    assert np.array_equal(found_scales, scales.astype(np.float32))
    values = codes * expand(scales.astype(np.float32), 32)
    assert np.array_equal(reference.dequantize(data, Type.Q4_0), values)


@given(shapes, seeds)
def test_q8_0_returns_what_was_packed_and_means_what_ggml_reads(shape: tuple[int, int], seed: int) -> None:
    codes, scales = _grid(seed, *shape, -128, 127)
    data = pack_q8_0(codes, scales)
    found_codes, found_scales = unpack_q8_0(data)
    assert np.array_equal(found_codes, codes)
    assert np.array_equal(found_scales, scales.astype(np.float32))
    values = codes * expand(scales.astype(np.float32), 32)
    assert np.array_equal(reference.dequantize(data, Type.Q8_0), values)


@given(shapes, seeds, st.sampled_from([0.0, 1e-7, 0.02, 30.0]))
def test_plain_values_become_the_same_q8_0_as_ggml_makes(shape: tuple[int, int], seed: int, size: float) -> None:
    values = (np.random.default_rng(seed).standard_normal((shape[0], shape[1] * 32)) * size).astype(np.float32)
    assert np.array_equal(quantize_q8_0(values), reference.quantize(values, Type.Q8_0))


def test_ties_are_rounded_away_from_zero() -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, :4] = 127, 0.5, -2.5, 0.49999997
    codes, scales = unpack_q8_0(quantize_q8_0(values))
    assert scales[0, 0] == 1
    assert codes[0, :4].tolist() == [127, 1, -3, 0]


def test_only_f16_numbers_are_halved() -> None:
    assert half(np.float32([0.5, 2.0**-24, 65504, 0])) is not None
    assert half(np.float32([0.5, 2.0**-25])) is None
    assert half(np.float32([70000.0])) is None
    assert half(np.float32([1 + 2.0**-11])) is None


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A small file with every kind of metadata and five types of tensors, of a Gemma 3 with one layer."""
    stream = np.random.default_rng(0)
    codes, scales = _grid(1, 6, 2, -8, 7)
    values = stream.standard_normal((6, 64)).astype(np.float32)
    metadata = {
        "general.architecture": string("gemma3"),
        "gemma3.block_count": uint32(1),
        "a.float": float32(0.1),
        "a.flag": boolean(True),
        "an.array": int32([1, -2, 3]),
        "some.words": string(["▁the", "", "x" * 300]),
    }
    data = {
        "token_embd.weight": (Type.Q4_0, pack_q4_0(codes, scales)),
        "blk.0.attn_q.weight": (Type.Q8_0, quantize_q8_0(values)),
        "blk.0.attn_k.weight": (Type.BF16, to_bf16(values)),
        "blk.0.attn_v.weight": (Type.Q5_0, reference.quantize(values, Type.Q5_0)),
        "output_norm.weight": (Type.F32, np.float32([1.5, 2, 0.25])),
    }
    path = tmp_path / "small.gguf"
    sizes = {name: (3,) if name == "output_norm.weight" else (6, 64) for name in data}
    with Writer(path, metadata, sizes) as out:
        for name, (kind, array) in data.items():
            for row in array if array.ndim == 2 else [array]:
                out.write(name, kind, row)
    return path


def test_another_reader_reads_what_was_written(written: Path) -> None:
    theirs = GGUFReader(written)
    assert theirs.fields["some.words"].contents() == ["▁the", "", "x" * 300]
    assert theirs.fields["an.array"].contents() == [1, -2, 3]
    assert theirs.fields["a.flag"].contents() is True
    ours = read(written)
    assert list(ours.metadata["some.words"]) == ["▁the", "", "x" * 300]
    assert ours.metadata["some.words"][1:] == ["", "x" * 300]
    assert ours.metadata["a.float"] == np.float32(0.1)
    assert ours.metadata["an.array"].tolist() == [1, -2, 3]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.type, mine.offset) == (tensor.tensor_type, tensor.data_offset)
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        rows = mine.nbytes // mine.row_bytes
        assert np.array_equal(ours.rows(mine, 0, rows).ravel(), tensor.data.view(np.uint8).ravel())


def test_tensors_have_canonical_names_values_and_grids(written: Path) -> None:
    found = gguf.tensors(written)
    assert list(found) == [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
    ]
    assert found["model.norm.weight"].numpy().tolist() == [0.5, 1, -0.75]
    for name, tensor in found.items():
        if len(tensor.shape) == 2:
            kind = read(written).tensors[gguf.file_names(Gemma3(), 1)[name]]
            expected = reference.dequantize(read(written).rows(kind, 2, 5), kind.type)
            rows = tensor.rows(2, 5)
            assert np.array_equal(rows.values, expected)
            assert np.array_equal(tensor.numpy()[2:5], expected)
            assert (rows.codes is None) == (tensor.grid is None)
    grids = [tensor.grid.bits if tensor.grid else None for tensor in found.values()]
    assert grids == [4, None, 8, None, 5]


def test_a_copy_in_f32_has_the_same_numbers_and_metadata(written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    gguf.write_f32(written, copy)
    before, after = gguf.tensors(written), gguf.tensors(copy)
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert np.array_equal(after[name].numpy(), tensor.numpy())
        assert after[name].dtype == "f32"
    assert read(written).packed == read(copy).packed


def test_every_truncation_is_refused(written: Path) -> None:
    whole = written.read_bytes()
    # The last tensor is padded; what is cut off from the padding is not missed.
    last = max(item.offset + item.nbytes for item in read(written).tensors.values())
    for length in [*range(0, last, 7), last - 1]:
        written.write_bytes(whole[:length])
        with pytest.raises(InputError):
            gguf.tensors(written)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_headers_are_refused_or_read(data: st.DataObject) -> None:
    """Any byte of the header may be anything: it is read, or refused by name, and nothing else happens."""
    whole = bytearray(_HEADER)
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = _SCRATCH / "damaged.gguf"
    path.write_bytes(whole)
    with suppress(InputError):
        for tensor in gguf.tensors(path).values():
            tensor.numpy()


@pytest.fixture(autouse=True, scope="module")
def _scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A short file to damage; Hypothesis does not allow fixtures that are made anew for each example."""
    global _SCRATCH, _HEADER  # noqa: PLW0603 - shared with the property test above
    _SCRATCH = tmp_path_factory.mktemp("damaged")
    path = _SCRATCH / "whole.gguf"
    metadata = {"general.architecture": string("gemma4"), "gemma4.block_count": uint32(1), "x": string(["a", "b"])}
    with Writer(path, metadata, {"token_embd.weight": (4, 32), "output_norm.weight": (32,)}) as out:
        out.write("token_embd.weight", Type.Q8_0, quantize_q8_0(np.ones((4, 32), np.float32)))
        out.write("output_norm.weight", Type.F32, np.ones(32, np.float32))
    _HEADER = path.read_bytes()


_SCRATCH: Path
_HEADER: bytes


def _header_of(path: Path, *fields: bytes) -> Path:
    path.write_bytes(b"GGUF" + b"".join(fields) + bytes(64))
    return path


@pytest.mark.parametrize(
    ("tensors", "values"), [(1 << 60, 0), (3, 0), (0, 1 << 60)], ids=["huge", "more than there are", "metadata"]
)
def test_lying_counts_are_refused(tmp_path: Path, tensors: int, values: int) -> None:
    fields = ((3).to_bytes(4, "little"), tensors.to_bytes(8, "little"), values.to_bytes(8, "little"))
    with pytest.raises(InputError):
        read(_header_of(tmp_path / "lies.gguf", *fields))


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "llama.gguf"
    with Writer(path, {"general.architecture": string("llama"), "llama.block_count": uint32(1)}, {}):
        pass
    with pytest.raises(InputError, match="'llama'"):
        gguf.tensors(path)


def test_a_tensor_can_be_begun_again_in_another_type(tmp_path: Path) -> None:
    path = tmp_path / "again.gguf"
    with Writer(path, {"general.architecture": string("gemma3")}, {"first": (2, 32), "second": (2, 32)}) as out:
        out.write("first", Type.Q8_0, np.zeros(34, np.uint8))
        out.restart("first")
        out.write("first", Type.F32, np.ones((2, 32), np.float32))
        out.write("second", Type.Q8_0, np.zeros((2, 34), np.uint8))
        out.restart("second")
        out.write("second", Type.BF16, np.full((2, 32), 7, np.uint16))
    found = read(path)
    assert [item.type for item in found.tensors.values()] == [Type.F32, Type.BF16]
    assert found.rows(found.tensors["first"], 0, 2).view("<f4").tolist() == [[1.0] * 32] * 2
    assert found.rows(found.tensors["second"], 0, 2).view("<u2").tolist() == [[7] * 32] * 2


def test_a_tensor_that_is_not_whole_is_a_bug(tmp_path: Path) -> None:
    out = Writer(tmp_path / "short.gguf", {}, {"first": (2, 32), "second": (1,)})
    out.write("first", Type.F32, np.ones(32, np.float32))
    with pytest.raises(ValueError, match="first: 128 bytes written of 256"):
        out.write("second", Type.F32, np.ones(1, np.float32))
    out = Writer(tmp_path / "missing.gguf", {}, {"first": (1,), "second": (1,)})
    out.write("first", Type.F32, np.ones(1, np.float32))
    with pytest.raises(ValueError, match="second"):
        out.close()


def test_sums_and_factors_are_undone(tmp_path: Path) -> None:
    path = tmp_path / "factor.gguf"
    metadata = {
        "general.architecture": string("gemma3"),
        "gemma3.block_count": uint32(1),
        gguf.Q_NORM_FACTOR: float32(0.5),
    }
    with Writer(path, metadata, {"blk.0.attn_q_norm.weight": (2,), "blk.0.attn_k_norm.weight": (2,)}) as out:
        out.write("blk.0.attn_q_norm.weight", Type.F32, np.float32([1.0, 0.25]))
        out.write("blk.0.attn_k_norm.weight", Type.F32, np.float32([1.0, 0.25]))
    found = gguf.tensors(path)
    assert found["model.layers.0.self_attn.q_norm.weight"].numpy().tolist() == [1.0, -0.5]
    assert found["model.layers.0.self_attn.k_norm.weight"].numpy().tolist() == [0.0, -0.75]
