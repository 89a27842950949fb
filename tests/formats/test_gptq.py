"""GPTQ and AWQ checkpoints: what their own libraries wrote is read bit for bit, and what is broken is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemexport.formats import awq, gptq
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.gemma.names import canonical_name
from gemexport.formats.modules import Module
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import Entry, ShardedWriter, read_folder
from gemexport.formats.tensor import to_bf16

MODULE = "model.layers.1.mlp.down_proj"
NUMPY = {"F16": np.float16, "F32": np.float32, "I32": np.int32}


def _model(golden: Path, name: str, tiny_gemma3: Path, tmp_path: Path) -> Path:
    """A golden checkpoint with a tokenizer beside it, to damage."""
    folder = Path(shutil.copytree(golden / name, tmp_path / name))
    shutil.copyfile(tiny_gemma3 / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize(
    ("name", "bits", "kind", "block"),
    [
        ("gptq", 4, "zero-point", 32),
        ("gptq-v2", 3, "zero-point", 32),
        ("gptq-desc-act", 4, "symmetric", 1),
        ("awq", 4, "zero-point", 32),
    ],
)
def test_values_are_those_of_the_library(
    golden: Path, tiny_gemma3: Path, tmp_path: Path, name: str, bits: int, kind: str, block: int
) -> None:
    """values.json holds what gptqmodel, or AutoAWQ, makes of each module in float32 (tests/golden/README.md)."""
    found = open_checkpoint(_model(golden, name, tiny_gemma3, tmp_path))
    expected = json.loads((golden / name / "values.json").read_text())
    for stem, digest in expected.items():
        tensor = found.tensors[stem]
        assert hashlib.sha256(np.ascontiguousarray(tensor.numpy()).tobytes()).hexdigest() == digest, stem
        assert tensor.grid is not None
        assert (tensor.grid.bits, tensor.grid.kind, tensor.grid.block) == (bits, kind, block)
        part = tensor.rows(5, 39)
        np.testing.assert_array_equal(part.values, tensor.numpy()[5:39])
    assert {name for name, tensor in found.tensors.items() if tensor.grid} == expected.keys()
    assert found.left_out == ()
    assert bool(found.notes) == (name == "gptq-desc-act")


def _write(folder: Path, arrays: dict[str, np.ndarray]) -> Module:
    """A folder with one module of these arrays, 2-D weights of `[out, in]` as `shape` says."""
    names = {np.dtype(kind): name for name, kind in NUMPY.items()} | {np.dtype(np.uint16): "BF16"}
    entries = [Entry(f"{MODULE}.{key}", names[array.dtype], array.shape) for key, array in arrays.items()]
    with ShardedWriter(folder, entries) as out:
        for key, array in arrays.items():
            out.write(f"{MODULE}.{key}", array)
    stored = {canonical_name(name).rpartition(".")[2]: array for name, array in read_folder(folder).items()}
    return Module(f"{MODULE}.weight", (0, 0), stored)


def _pack_down(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[n, columns]` packed down the columns, lowest bits first, by arithmetic on big integers."""
    words = -(-codes.shape[0] * bits // 32)
    packed = np.zeros((words, codes.shape[1]), np.uint32)
    for column in range(codes.shape[1]):
        number = sum(int(code) << (bits * i) for i, code in enumerate(codes[:, column]))
        packed[:, column] = [(number >> (32 * word)) & 0xFFFFFFFF for word in range(words)]
    return packed.view(np.int32)


def _borrowed(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Zero points as the first version packs them along rows: one taken from all of a word at once."""
    packed = _pack_down(zeros.T, bits).T.copy().view(np.uint32)
    if 32 % bits:
        return _pack_down(((zeros.astype(int) - 1) % (1 << bits)).T, bits).T.copy()
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return (packed - ones).view(np.int32)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_gptq_module_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(gptq.BITS))
    out, groups = 32 * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    width, version = groups * 32, data.draw(st.sampled_from(["gptq", "gptq_v2"]))
    scale_dtype = data.draw(st.sampled_from(["F16", "F32", "BF16"]))
    stream = np.random.default_rng(data.draw(st.integers(0, 999)))
    codes, zeros = stream.integers(0, 1 << bits, (out, width)), stream.integers(0, 1 << bits, (out, groups))
    if data.draw(st.booleans()):
        zeros[:] = 1 << (bits - 1)
    scales = stream.uniform(0.01, 1, (groups, out)).astype(np.float16).astype(np.float32)
    order = stream.permutation(groups) if data.draw(st.booleans()) else np.arange(groups)
    group_of = np.repeat(order, 32)
    if scale_dtype == "BF16":
        stored = to_bf16(scales)
        scales = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = scales.astype(NUMPY[scale_dtype])
    arrays = {
        "qweight": _pack_down(codes.T, bits),
        "qzeros": _borrowed(zeros.T, bits) if version == "gptq" else _pack_down(zeros, bits).T.copy(),
        "scales": stored,
        "g_idx": group_of.astype(np.int32),
    }
    module = _write(tmp_path_factory.mktemp("gptq"), arrays)
    tensor = gptq.QuantizedTensor(
        module.name, (out, width), gptq._layout(Module(module.name, (out, width), module.arrays), bits, version)
    )
    expected = (codes - zeros[:, group_of]) * scales.T[:, group_of].astype(np.float64)
    np.testing.assert_array_equal(tensor.numpy(), expected.astype(np.float32))
    start = data.draw(st.integers(0, out - 1))
    stop = data.draw(st.integers(start + 1, out))
    np.testing.assert_array_equal(tensor.rows(start, stop).values, expected[start:stop].astype(np.float32))
    assert tensor.grid.kind == ("symmetric" if (zeros == 1 << (bits - 1)).all() else "zero-point")
    # Groups that follow each other are one block each, whatever their order.
    assert tensor.grid.block % 32 == 0


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([16, 32, 48]), st.integers(0, 999), st.data())
def test_any_awq_module_is_read(
    tmp_path_factory: pytest.TempPathFactory, octets: int, groups: int, block: int, seed: int, data: st.DataObject
) -> None:
    stream, out, width = np.random.default_rng(seed), 8 * octets, groups * block
    codes, zeros = stream.integers(0, 16, (out, width)), stream.integers(0, 16, (out, groups))
    scales = stream.uniform(0.01, 1, (groups, out)).astype(np.float16)

    def interleaved(numbers: np.ndarray) -> np.ndarray:
        # awq.modules.linear.gemm: nibble i of a word is column order_map[i].
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        eights = numbers.T.reshape(-1, octets, 8)[..., order]
        return np.asarray((eights << np.arange(0, 32, 4)).sum(-1).astype(np.uint32).view(np.int32))

    arrays = {"qweight": interleaved(codes), "qzeros": interleaved(zeros), "scales": scales}
    module = _write(tmp_path_factory.mktemp("awq"), arrays)
    tensor = awq._read(Module(module.name, (out, width), module.arrays))
    assert tensor is not None
    expected = (codes - zeros.repeat(block, axis=1)) * scales.T.astype(np.float64).repeat(block, axis=1)
    start = data.draw(st.integers(0, out - 1))
    stop = data.draw(st.integers(start + 1, out))
    np.testing.assert_array_equal(tensor.rows(start, stop).values, expected[start:stop].astype(np.float32))


def _damage(folder: Path, key: str, change: Any) -> None:
    """Change, or drop, one array of the module."""
    entries, arrays = [], {}
    for name, stored in read_folder(folder).items():
        array, dtype = np.array(stored.array).reshape(stored.entry.shape), stored.entry.dtype
        if name == f"{MODULE}.{key}":
            if change is None:
                continue
            array, dtype = change(array)
        entries.append(Entry(name, dtype, array.shape))
        arrays[name] = array
    (folder / "model.safetensors").unlink()
    with ShardedWriter(folder, entries) as out:
        for entry in entries:
            out.write(entry.name, arrays[entry.name])


@pytest.mark.parametrize("name", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("scales", None, r"down_proj\.scales is missing"),
        ("qzeros", None, r"down_proj\.qzeros is missing"),
        ("qweight", None, r"down_proj\.weight is missing"),
        ("qweight", lambda array: (array[:-1], "I32"), r"is stored as .*, which does not make \[64, 128\]"),
        ("qweight", lambda array: (array.reshape(-1), "I32"), "which does not make"),
        ("qweight", lambda array: (array.astype(np.int8), "I8"), "which does not make"),
        ("qzeros", lambda array: (array[:1], "I32"), "which does not make"),
        ("scales", lambda array: (array[:, 1:], "F16" if array.dtype == np.float16 else "BF16"), "does not make"),
        ("scales", lambda array: (array[0], "F16" if array.dtype == np.float16 else "BF16"), "does not make"),
    ],
)
def test_broken_modules(
    golden: Path, tiny_gemma3: Path, tmp_path: Path, name: str, key: str, change: Any, message: str
) -> None:
    folder = _model(golden, name, tiny_gemma3, tmp_path)
    _damage(folder, key, change)
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: (array[1:], "I32"), "does not make"),
        (lambda array: (array + 1, "I32"), "does not make"),
        (lambda array: (array - 1, "I32"), "does not make"),
    ],
)
def test_columns_of_groups_that_there_are_not(
    golden: Path, tiny_gemma3: Path, tmp_path: Path, change: Any, message: str
) -> None:
    folder = _model(golden, "gptq", tiny_gemma3, tmp_path)
    _damage(folder, "g_idx", change)
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "settings_", "message"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "the GPTQ format marlin, packed in int32, is not known"),
        ("gptq", {"pack_dtype": "int8"}, "packed in int8, is not known"),
        ("gptq", {"bits": "many"}, "not understood .bits"),
        ("awq", {"version": "gemv"}, "the AWQ version gemv with 4 bits is not known"),
        ("awq", {"bits": 3}, "with 3 bits is not known"),
        ("awq", {"version": None}, "not understood .version"),
    ],
)
def test_varieties_that_are_refused(
    golden: Path, tiny_gemma3: Path, tmp_path: Path, name: str, settings_: dict[str, Any], message: str
) -> None:
    folder = _model(golden, name, tiny_gemma3, tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= settings_
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


def test_a_method_that_is_not_known(golden: Path, tiny_gemma3: Path, tmp_path: Path) -> None:
    folder = _model(golden, "gptq", tiny_gemma3, tmp_path)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"quant_method": "gptq"', '"quant_method": "hqq"'))
    with pytest.raises(InputError, match=r"quantized in a way that is not known here \(hqq\)"):
        open_checkpoint(folder)
