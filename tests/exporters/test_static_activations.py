"""Static activation scales reach the formats that have a place for them, and come back as they were."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import with_grids

from gemexport.demo import mobile as demo_mobile
from gemexport.exporters import compressed_tensors, coreml
from gemexport.exporters.compressed_tensors import activations as compressed_tensors_activations
from gemexport.formats.activations import Activations, CacheActivations, LinearActivations, Quantizer
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.compressed_tensors.activations import quantizer
from gemexport.formats.compressed_tensors.settings import Args
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import ShardedWriter, read_folder
from gemexport.registry import TARGETS

WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(demo_mobile.make(tmp_path_factory.mktemp("mobile") / "model", size="tiny"))


@st.composite
def quantizers(draw: st.DrawFn) -> Quantizer:
    bits, signed = draw(st.sampled_from([4, 8, 16])), draw(st.booleans())
    low = -(1 << (bits - 1)) if signed else 0
    zero = draw(st.integers(low, low + (1 << bits) - 1)) if bits <= 8 else low + (1 << (bits - 1))
    return Quantizer(float(np.float32(draw(st.floats(2.0**-20, 1024.0, width=32)))), zero, bits, signed)


@given(one=quantizers())
@settings(max_examples=40, deadline=None)
def test_written_and_read_back(one: Quantizer, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every number that the integers stand for is the same, also where the library's integers are others."""
    folder = tmp_path_factory.mktemp("scales")
    signed = compressed_tensors_activations.signed(Activations({WEIGHT: LinearActivations(one)}))
    arrays = list(compressed_tensors_activations.arrays(signed))
    with ShardedWriter(folder, [entry for entry, _ in arrays]) as out:
        for entry, values in arrays:
            out.write(entry.name, values)
    module = {name.rpartition(".")[2]: array for name, array in read_folder(folder).items()}
    found = quantizer(module, "input", Args(num_bits=one.bits, strategy="tensor"))
    assert found is not None
    assert found == signed.linears[WEIGHT].input
    assert found.scale == one.scale
    assert [limit - found.zero_point for limit in found.limits] == [limit - one.zero_point for limit in one.limits]


def test_compressed_tensors(mobile: Checkpoint, tmp_path: Path) -> None:
    assert mobile.activations is not None
    given = mobile.activations
    weight = next(name for name, both in given.linears.items() if both.input and both.output)
    shifted = LinearActivations(given.linears[weight].input, Quantizer(0.0078125, 100, 8, False))
    checkpoint = replace(mobile, activations=Activations({**given.linears, weight: shifted}, given.caches))
    export = compressed_tensors.export(checkpoint, tmp_path / "ct")
    found = TARGETS["compressed-tensors"].activations(export.path)
    assert found is not None
    assert found.linears == {**given.linears, weight: replace(shifted, output=Quantizer(0.0078125, -28))}
    assert not found.caches, "heads of two sizes"
    assert any("caches are left out" in note for note in export.notes)
    again = open_checkpoint(export.path)
    assert again.activations == found
    assert again.left_out == ()
    packed = compressed_tensors.export(checkpoint, tmp_path / "packed", pack_embeddings=True)
    assert TARGETS["compressed-tensors"].activations(packed.path) == found, "embeddings as codes cost no activations"


def test_what_unpacks_early_rounds_nothing(tiny_gemma3: Path, tmp_path: Path) -> None:
    """A packed embedding that is the head too has transformers unpack while it loads, into a model of plain linears."""
    checkpoint = with_grids(tiny_gemma3, tmp_path / "grids", "lossless")
    given = Activations({WEIGHT: LinearActivations(Quantizer(0.25))})
    packed = compressed_tensors.export(replace(checkpoint, activations=given), tmp_path / "ct", pack_embeddings=True)
    assert TARGETS["compressed-tensors"].activations(packed.path) is None
    assert any("1 linears" in note and "left out" in note for note in packed.notes)


def test_caches_of_compressed_tensors(tiny_gemma3: Path, tmp_path: Path) -> None:
    checkpoint = with_grids(tiny_gemma3, tmp_path / "grids", "lossless")
    caches = {
        layer.index: CacheActivations(Quantizer(0.0625 + layer.index), Quantizer(0.25))
        for layer in checkpoint.architecture.layers
    }
    given = Activations({}, caches)
    path = compressed_tensors.export(replace(checkpoint, activations=given), tmp_path / "ct").path
    assert json.loads((path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    assert TARGETS["compressed-tensors"].activations(path) == given
    assert open_checkpoint(path).activations == given


@pytest.mark.parametrize(("scale", "zero"), [(0.0, 0), (-1.0, 0), (float("inf"), 0), (1.0, 100)])
def test_no_range_of_integers(scale: float, zero: int, tmp_path: Path) -> None:
    wrong = Activations({WEIGHT: LinearActivations(Quantizer(scale, zero))})
    arrays = list(compressed_tensors_activations.arrays(wrong))
    with ShardedWriter(tmp_path, [entry for entry, _ in arrays]) as out:
        for entry, values in arrays:
            out.write(entry.name, values)
    module = {name.rpartition(".")[2]: array for name, array in read_folder(tmp_path).items()}
    with pytest.raises(InputError, match="no range of integers"):
        quantizer(module, "input", Args(num_bits=4, strategy="tensor"))


def test_core_ml(mobile: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    assert mobile.activations is not None
    given = mobile.activations
    weight = next(name for name, both in given.linears.items() if both.input and both.output)
    shifted = LinearActivations(Quantizer(0.0234375, 3), Quantizer(0.0078125, 100, 8, False))
    checkpoint = replace(mobile, activations=Activations({**given.linears, weight: shifted}, given.caches))
    path = coreml.export(checkpoint, tmp_path / "a.mlpackage", context=64).path
    assert TARGETS["coreml"].activations(path) == checkpoint.activations
    assert not coreml.placed(given, "none")
    assert coreml.placed(given, "linears") == given.without_caches()
    wide = Activations({weight: LinearActivations(Quantizer(1.0, bits=16))})
    assert not coreml.placed(wide, "all"), "Core ML has no wider integers"


def test_differences_are_named() -> None:
    right, wrong = Quantizer(0.5), Quantizer(1.0)
    given = Activations({"a": LinearActivations(right, right)}, {3: CacheActivations(right, None)})
    assert list(given.differences(None)) == []
    assert list(given.differences(given)) == []
    assert list(given.differences(Activations({"a": LinearActivations(right)}))) == [], "left out, not wrong"
    other = Activations(
        {"a": LinearActivations(wrong, right), "b": LinearActivations(None, right)}, {3: CacheActivations(right, right)}
    )
    assert list(given.differences(other)) == ["a, input", "b, output", "cache of layer 3, value"]
    measured = Activations({"a": LinearActivations(Quantizer(0.3, 128, 8, False), Quantizer(0.3, bits=16))})
    assert list(given.differences(measured)) == [], "of an exporter's own ranges"
