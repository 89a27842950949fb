"""What is stored of a tensor is read and put back without a byte changed, in every format."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from gemexport.exporters import compressed_tensors, coreml, gguf, mlx, onnx
from gemexport.faults.places import PLACES
from gemexport.faults.sources import SOURCES
from gemexport.faults.stored import Packed, Twice
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.registry import TARGETS

NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.layers.1.layer_scalar")
CODED = (
    "model.embed_tokens.weight", "model.embed_tokens_per_layer.weight", "model.layers.2.mlp.up_proj.weight",
    "model.layers.17.mlp.down_proj.weight", "model.layers.0.per_layer_input_gate.weight",
)  # fmt: skip
EXPORTERS = {
    "gguf": (gguf, "Q4_0"), "mlx": (mlx, "4bit"), "onnx": (onnx, "int4"), "coreml": (coreml, "int4"),
    "compressed-tensors": (compressed_tensors, "w4a16"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_mobile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with grids of 2, 4 and 8 bits."""
    return SOURCES["mobile"](tmp_path_factory.mktemp("mobile") / "model")


def digest(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize("target", EXPORTERS)
def test_reading_and_writing_back_changes_nothing(target: str, gemma4: Checkpoint, tmp_path: Path) -> None:
    exporter, variant = EXPORTERS[target]
    path = TARGETS[target].path(tmp_path, "model", variant)
    path.parent.mkdir(parents=True)
    exporter.export(gemma4, path, variant=variant)
    before = digest(path)
    for name in NAMES:
        place = PLACES[target](path, name)
        numbers = place.read()
        assert numbers.codes.shape[-1] == gemma4.tensors[name].shape[-1]
        place.write(numbers)
        again = PLACES[target](path, name).read()
        assert (again.codes == numbers.codes).all()
    assert digest(path) == before


@pytest.mark.parametrize("target", EXPORTERS)
def test_codes_of_any_width_are_read_and_written_back(target: str, tiny_mobile: Path, tmp_path: Path) -> None:
    """A mobile checkpoint has codes of 2, 4 and 8 bits, in blocks that are rows."""
    exporter, variant = EXPORTERS[target]
    path = TARGETS[target].path(tmp_path, "model", variant)
    path.parent.mkdir(parents=True)
    checkpoint = open_checkpoint(tiny_mobile)
    exporter.export(checkpoint, path, variant=variant)
    stored, before, widths = TARGETS[target].reader().tensors(path), digest(path), set()
    for name in CODED:
        tensor, grid = checkpoint.tensors[name], stored[name].grid
        assert grid is not None
        place = PLACES[target](path, name)
        numbers = place.read()
        assert numbers.codes.shape == tensor.shape
        assert numbers.bits in (grid.bits, 8)  # a code of fewer may be a byte
        codes, _ = stored[name].rows(0, 4).grid()
        # Signed, or counted from the lowest, or bit patterns of signed ones.
        assert np.unique((numbers.codes[:4].astype(int) - codes) % (1 << grid.bits)).size == 1
        assert numbers.codes.max() <= numbers.largest
        widths.add(numbers.bits)
        place.write(numbers)
    assert digest(path) == before
    assert widths == ({4, 8} if target == "gguf" else {2, 4, 8})


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_matrix_that_is_held_both_ways_round(bits: int, tmp_path: Path) -> None:
    """The embedding and the head of a graph for an NPU: of plain weights, in 8 bits."""
    codes = np.arange(24 * 16, dtype=np.uint8).reshape(24, 16) & np.uint8((1 << bits) - 1)
    places = []
    for array, turned in ((codes, False), (codes.T, True)):
        fields = array.reshape(len(array), -1, 8 // bits) << np.arange(0, 8, bits, dtype=np.uint8)
        file = tmp_path / f"{turned}"
        file.write_bytes(fields.sum(axis=2, dtype=np.uint8).tobytes())
        stored = np.memmap(file, np.uint8, "r", shape=fields.shape[:2])
        places.append(Packed(stored, [], turned, bits))
    for place in places:
        np.testing.assert_array_equal(place.read().codes, codes)
    before = digest(tmp_path)
    both = Twice(places)
    numbers = both.read()
    both.write(numbers)
    assert digest(tmp_path) == before
    numbers.codes[3, 5] ^= 1
    both.write(numbers)
    for place in places:
        np.testing.assert_array_equal(np.argwhere(place.read().codes != codes), [[3, 5]])
