"""The weight file against coremltools' own reader and writer of it, and against damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemexport.formats.coreml.blob import TYPES, BlobFile, BlobLayout, BlobWriter, Entry, pack, unpack
from gemexport.formats.storage.errors import InputError

NARROW = [kind for kind in TYPES.values() if kind.bits < 8]


def codes_of(kind_name: str, count: int, seed: int = 0) -> np.ndarray:
    """Random elements of a type."""
    kind = TYPES[kind_name]
    rng = np.random.default_rng(seed)
    if kind.dtype.kind == "f":
        return rng.normal(size=count).astype(kind.dtype)
    low = -(1 << (kind.bits - 1)) if kind.signed or kind.dtype.kind == "i" else 0
    high = (1 << (kind.bits - 1)) if low else 1 << min(kind.bits, 31)
    return rng.integers(low, high, count).astype(kind.dtype)


def write(path: Path, arrays: dict[str, tuple[str, np.ndarray]]) -> BlobLayout:
    layout = BlobLayout()
    for name, (kind, values) in arrays.items():
        layout.add(Entry(name, kind, values.size))
    with BlobWriter(path, layout) as writer:
        for name, (_, values) in arrays.items():
            writer.write(name, values)
    return layout


@given(st.sampled_from([kind.name for kind in NARROW]), st.integers(0, 70), st.data())
def test_any_run_of_packed_codes_comes_back(kind_name: str, count: int, data: st.DataObject) -> None:
    kind = TYPES[kind_name]
    codes = codes_of(kind_name, count, data.draw(st.integers(0, 99)))
    packed = pack(codes, kind.bits)
    assert packed.nbytes == -(-count * kind.bits // 8)
    start = data.draw(st.integers(0, count))
    run = data.draw(st.integers(0, count - start))
    assert (unpack(packed, kind.bits, start, run, kind.signed) == codes[start : start + run]).all()


def test_two_int4_codes_share_a_byte_the_first_one_low() -> None:
    assert pack(np.array([-8, 7, 1, 2]), 4).tolist() == [0x78, 0x21]


@pytest.mark.parametrize("kind", [name for name in TYPES if name not in ("bf16",)])
def test_coremltools_reads_what_is_written(kind: str, tmp_path: Path) -> None:
    storage = pytest.importorskip("coremltools.libmilstoragepython")
    values, more = codes_of(kind, 37), codes_of(kind, 64, seed=1)
    layout = write(tmp_path / "weight.bin", {"a": (kind, values), "b": (kind, more)})
    reader = storage._BlobStorageReader(str(tmp_path / "weight.bin"))
    read = getattr(reader, {"fp16": "read_fp16_data", "fp32": "read_float_data"}.get(kind, f"read_{kind}_data"))
    for name, wanted in (("a", values), ("b", more)):
        found = np.asarray(read(layout.offsets[name]))
        if kind == "fp16":
            found = found.view(np.float16)
        assert (found == wanted).all()


@pytest.mark.parametrize("kind", ["int4", "uint2", "uint3", "uint6", "uint1"])
def test_what_coremltools_writes_is_read(kind: str, tmp_path: Path) -> None:
    storage = pytest.importorskip("coremltools.libmilstoragepython")
    values = codes_of(kind, 37)
    writer = storage._BlobStorageWriter(str(tmp_path / "weight.bin"))
    offset = getattr(writer, f"write_{kind}_data")(values)
    del writer
    blob = BlobFile(tmp_path / "weight.bin").blob(offset, kind, values.size)
    assert (blob.elements(0, values.size) == values).all()


def test_rows_of_two_blobs_may_be_written_by_turns(tmp_path: Path) -> None:
    codes, scales = codes_of("int4", 96).reshape(6, 16), codes_of("fp16", 6).reshape(6, 1)
    layout = BlobLayout()
    layout.add(Entry("codes", "int4", 96))
    layout.add(Entry("scales", "fp16", 6))
    with BlobWriter(tmp_path / "weight.bin", layout) as writer:
        for row in range(6):
            writer.write("codes", codes[row])
            writer.write("scales", scales[row])
    file = BlobFile(tmp_path / "weight.bin")
    assert (file.blob(layout.offsets["codes"], "int4", 96).elements(0, 96).reshape(6, 16) == codes).all()
    assert (file.blob(layout.offsets["scales"], "fp16", 6).elements(0, 6) == scales.ravel()).all()


def test_a_blob_that_is_not_filled_is_an_error(tmp_path: Path) -> None:
    layout = BlobLayout()
    layout.add(Entry("a", "fp32", 4))
    writer = BlobWriter(tmp_path / "weight.bin", layout)
    writer.write("a", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="do not fit"):
        writer.write("a", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="3 elements of 4"):
        writer.close()
    with pytest.raises(ValueError, match="two blobs"):
        layout.add(Entry("a", "fp16", 1))


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weight.bin"
    layout = write(path, {"a": ("fp16", codes_of("fp16", 100))})
    offset = layout.offsets["a"]
    whole = path.read_bytes()
    with pytest.raises(InputError, match="expects 99 fp16"):
        BlobFile(path).blob(offset, "fp16", 99)
    with pytest.raises(InputError, match="expects 100 fp32"):
        BlobFile(path).blob(offset, "fp32", 100)
    with pytest.raises(InputError, match="no blob metadata"):
        BlobFile(path).blob(offset + 64, "fp16", 100)
    with pytest.raises(InputError, match="no metadata at byte 100000"):
        BlobFile(path).blob(100_000, "fp16", 100)
    path.write_bytes(whole[:-10])
    with pytest.raises(InputError, match="ends beyond the file"):
        BlobFile(path).blob(offset, "fp16", 100)
    path.write_bytes(b"\0" * 64)
    with pytest.raises(InputError, match="not a Core ML weight file"):
        BlobFile(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read"):
        BlobFile(path)
    with pytest.raises(InputError, match="cannot be read"):
        BlobFile(tmp_path / "none.bin")
