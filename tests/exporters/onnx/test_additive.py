"""Per-layer embeddings in the vector codec, in ONNX: read back code by code, and computed by ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.gemma.names import PER_LAYER_EMBEDDING
from gemexport.formats.grids import additive_fit
from gemexport.formats.grids.additive import AdditiveTensor
from gemexport.formats.grids.vector_codec import Codec, parse
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import ArrayTensor

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("torch")
exporter = pytest.importorskip("gemexport.exporters.onnx")
reader = pytest.importorskip("gemexport.formats.onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from gemexport.exporters.onnx.additive import additive_rows  # noqa: E402
from gemexport.exporters.onnx.graph import GraphBuilder, Weights  # noqa: E402

NAME = PER_LAYER_EMBEDDING


def coded(source: Path, spelling: str, folder: Path) -> Checkpoint:
    """The checkpoint with its per-layer embeddings in a codec."""
    checkpoint = open_checkpoint(source)
    additive_fit.find_codec(checkpoint, folder / "codec", parse(spelling))
    return additive_fit.attach(checkpoint, folder / "codec")


@pytest.mark.parametrize("spelling", ["aqlm:2x8", "aqlm:3x5:4"])
@pytest.mark.parametrize("variant", ["int4", "npu"])
def test_codes_codebooks_and_scales_come_back(tiny_gemma4: Path, tmp_path: Path, variant: str, spelling: str) -> None:
    checkpoint = coded(tiny_gemma4, spelling, tmp_path)
    paths = [exporter.export(checkpoint, tmp_path / name, variant=variant).path for name in "ab"]
    wanted, found = checkpoint.tensors[NAME], reader.tensors(paths[0])[NAME]
    assert (found.shape, found.grid, found.fitted_rms) == (wanted.shape, wanted.grid, wanted.fitted_rms)
    assert found.grid is not None
    assert (found.grid.kind, found.grid.codec) == ("vectors", str(parse(spelling)))
    ours, theirs = wanted.rows(0, wanted.shape[0]), found.rows(0, found.shape[0])
    for one, other in ((ours.codes, theirs.codes), (ours.scales, theirs.scales), (ours.values, theirs.values)):
        assert one is not None
        assert np.array_equal(one, other)
    for file in paths[0].iterdir():
        assert file.read_bytes() == (paths[1] / file.name).read_bytes(), file.name


def test_the_runtime_looks_up_what_the_codec_says(tiny_gemma4: Path, tmp_path: Path) -> None:
    checkpoint = coded(tiny_gemma4, "aqlm:2x8", tmp_path)
    folder = exporter.export(checkpoint, tmp_path / "npu", variant="npu").path
    session = onnxruntime.InferenceSession(folder / "embeddings.onnx", providers=["CPUExecutionProvider"])
    ids = np.array([[0, 511, 7, 7, 300]], np.int64)
    found = session.run(["per_layer_inputs"], {"input_ids": ids})[0]
    assert checkpoint.architecture.per_layer is not None
    factor = np.float32(checkpoint.architecture.per_layer.embed_scale)
    assert np.array_equal(found[0], checkpoint.tensors[NAME].numpy()[ids[0]] * factor)


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_the_operators_compute_the_formula(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    codec = Codec(codebooks=data.draw(st.integers(1, 4)), bits=data.draw(st.integers(2, 8)), vector=4)
    rows, blocks, vectors = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    generator = np.random.default_rng(data.draw(st.integers(0, 1 << 20)))
    codes = generator.integers(0, codec.entries, (rows, blocks * vectors, codec.codebooks), np.uint8)
    books = generator.standard_normal((codec.codebooks, codec.entries, 4)).astype(np.float16).astype(np.float32)
    scales = generator.standard_normal((rows, blocks)).astype(data.draw(st.sampled_from((np.float16, np.float32))))
    tensor = AdditiveTensor(NAME, codec, codes, books, scales)
    folder, graph, weights = tmp_path_factory.mktemp("graph"), GraphBuilder("table"), Weights({NAME: tensor})
    ids = graph.input("ids", ir.DataType.INT64, ["batch", "n"])
    found = additive_rows(graph, weights, tensor, ids, "table.data")
    graph.output(found, "rows", ir.DataType.FLOAT, ["batch", "n", tensor.shape[1]])
    weights.write(folder, lambda _: None)
    graph.save(folder / "model.onnx", "gemexport")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    asked = generator.integers(0, rows, (2, 3))
    values = session.run(None, {"ids": asked})[0]
    # Sums of up to four f16 numbers of like size are exact in f32, so there is one rounding.
    assert np.array_equal(values, tensor.numpy()[asked])
    back = reader.tensors(folder)[NAME]
    assert np.array_equal(back.numpy(), tensor.numpy())


def test_static_activations_leave_the_lookup_as_it_is(tiny_gemma4: Path, tmp_path: Path) -> None:
    checkpoint = coded(tiny_gemma4, "aqlm:2x8", tmp_path)
    tokens = np.random.default_rng(1).integers(10, 250, 16).tolist()
    path = exporter.export(
        checkpoint, tmp_path / "npu-a8", variant="npu-a8", calibration=[tokens], context=32, prefill=8
    ).path
    assert np.array_equal(reader.tensors(path)[NAME].numpy(), checkpoint.tensors[NAME].numpy())


def test_f32_scales_stay_what_they_are(tiny_gemma4: Path, tmp_path: Path) -> None:
    """A table so small that f16 would lose bits of its scales."""
    checkpoint = open_checkpoint(tiny_gemma4)
    small = ArrayTensor(NAME, checkpoint.tensors[NAME].numpy() * np.float32(2.0**-20))
    checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, NAME: small})
    additive_fit.find_codec(checkpoint, tmp_path / "codec", parse("aqlm:1x4"))
    checkpoint = additive_fit.attach(checkpoint, tmp_path / "codec")
    found = reader.tensors(exporter.export(checkpoint, tmp_path / "int4").path)[NAME]
    assert found.grid is not None
    assert found.grid.scale_dtype == "f32"
    assert np.array_equal(found.numpy(), checkpoint.tensors[NAME].numpy())


def test_a_plain_variant_of_a_coded_checkpoint_holds_its_values(tiny_gemma4: Path, tmp_path: Path) -> None:
    checkpoint = coded(tiny_gemma4, "aqlm:1x6", tmp_path)
    found = reader.tensors(exporter.export(checkpoint, tmp_path / "f32", variant="f32").path)[NAME]
    assert np.array_equal(found.numpy(), checkpoint.tensors[NAME].numpy())


def test_a_model_that_lacks_its_codebooks_is_refused(tiny_gemma4: Path, tmp_path: Path) -> None:
    import onnx

    path = exporter.export(coded(tiny_gemma4, "aqlm:1x6", tmp_path), tmp_path / "int4").path
    model = onnx.load(path / "model.onnx", load_external_data=False)
    for item in model.graph.initializer:
        if item.name == f"{NAME}{reader.CODEBOOKS}":
            item.name = "lost"
    for node in model.graph.node:
        node.input[:] = ["lost" if name == f"{NAME}{reader.CODEBOOKS}" else name for name in node.input]
    (path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="no codebooks"):
        reader.tensors(path)
