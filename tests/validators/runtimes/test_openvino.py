"""OpenVINO computes what the numbers in an NPU's graphs mean, and its verdict stands beside ONNX Runtime's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gemexport
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import ArrayTensor, Grid, expand
from gemexport.registry import TARGETS

pytest.importorskip("torch")
pytest.importorskip("openvino")
export = pytest.importorskip("gemexport.exporters.onnx").export
adapter = pytest.importorskip("gemexport.validators.runtimes.openvino")
onnxruntime = pytest.importorskip("gemexport.validators.runtimes.onnxruntime")
divergence = pytest.importorskip("gemexport.validators.checks.divergence")
whole = pytest.importorskip("gemexport.validators.runtimes.pytorch").whole
tensors = pytest.importorskip("gemexport.formats.onnx").tensors

TOKENS = np.random.default_rng(0).integers(10, 500, 75).tolist()


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    found: Checkpoint = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("grids", [True, False])
def test_an_artefact_is_the_model(checkpoint: Checkpoint, tmp_path: Path, grids: bool) -> None:
    """Lookup, prompt and decoding: caches overflow, and the first chunk has padding."""
    source = checkpoint if grids else open_checkpoint(checkpoint.path)
    path = export(source, tmp_path / "npu", variant="npu", context=128, prefill=16).path
    assert adapter.takes(path)
    runtime = adapter.load(path, threads=1, context=128)
    model = whole(source.text_config, tensors(path), 1)
    total = divergence.Divergence()
    total.add(model.logits(TOKENS), runtime.logits(TOKENS), TOKENS)
    assert total.kld_max < 1e-6
    assert total.top1_agreement == 1.0
    assert runtime.greedy(TOKENS[:21], 32) == model.greedy(TOKENS[:21], 32)
    assert runtime.arithmetic == "f32"
    assert runtime.name.startswith("OpenVINO 20")
    assert {lap for lap, _ in runtime.laps.laps} >= {1, 16}
    runtime.close()


@pytest.mark.parametrize("codec", [None, "aqlm:2x8"])
def test_it_looks_up_what_onnx_runtime_does(tiny_gemma4: Path, tmp_path: Path, codec: str | None) -> None:
    """Every row, packed or in a vector codec, bit for bit."""
    variants = {"onnx": ("npu",)}
    report = gemexport.export(
        tiny_gemma4, tmp_path / "out", formats=["onnx"], variants=variants, ple_codec=codec, validate=False
    )
    file = tmp_path / "out" / report.artifacts[0].path / "embeddings.onnx"
    ids = {"input_ids": np.arange(500)[None]}
    ours, theirs = adapter.OpenVinoSession(file, 1), onnxruntime.cpu_session(file, 1)
    assert [port.name for port in ours.get_outputs()] == [port.name for port in theirs.get_outputs()]
    for found, wanted in zip(ours.run(None, ids), theirs.run(None, ids), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_run_has_its_verdict_too(tiny_gemma3: Path, tmp_path: Path) -> None:
    report = gemexport.export(tiny_gemma3, tmp_path / "out", formats=["onnx"], tokens=64)
    free, fixed = report.artifacts
    assert [item.status for item in report.artifacts] == ["pass", "pass"]
    assert free.more_logits == ()
    [second] = fixed.more_logits
    assert second.runtime.startswith("OpenVINO")
    assert second.conversion is not None
    assert second.conversion.kld_mean < 1e-6
    named = [bound.metric for bound in fixed.bounds if second.runtime in bound.metric]
    assert len(named) == 3


def test_it_takes_what_it_can_run(tiny_gemma3: Path, tmp_path: Path) -> None:
    path = export(open_checkpoint(tiny_gemma3), tmp_path / "npu", variant="npu", context=64, prefill=8).path
    assert TARGETS["onnx"].seconds(path) == [adapter]
    assert TARGETS["mlx"].seconds(path) == []
    with pytest.raises(InputError, match="hold 64 positions"):
        adapter.load(path, threads=1, context=65)
    (path / "prefill.onnx").write_bytes((path / "prefill.onnx").read_bytes()[:100])
    with pytest.raises(InputError):
        adapter.OpenVinoSession(path / "prefill.onnx", 1)
    (path / "decode.onnx").unlink()
    assert not adapter.takes(path)


def test_two_bit_codes_are_not_for_it(tiny_gemma3: Path, tmp_path: Path) -> None:
    """It knows no INT2: such a folder is judged in ONNX Runtime alone."""
    source = open_checkpoint(tiny_gemma3)
    name = next(name for name in source.tensors if name.endswith("gate_proj.weight"))
    out, width = source.tensors[name].shape
    codes = np.random.default_rng(1).integers(-2, 2, (out, width)).astype(np.int8)
    scales = np.full((out, width // 32), 0.125, np.float32)
    coded = ArrayTensor(name, codes * expand(scales, 32), "f32", codes, scales, Grid(2, 32, "f16", lossless=True))
    made = replace(source, tensors={**source.tensors, name: coded})
    path = export(made, tmp_path / "npu", variant="npu", context=64, prefill=8).path
    assert TARGETS["onnx"].seconds(path) == []
    with pytest.raises(InputError, match="OpenVINO does not load it"):
        adapter.OpenVinoSession(path / "prefill.onnx", 1)


def test_without_it_there_is_no_second_verdict(
    tiny_gemma3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export(open_checkpoint(tiny_gemma3), tmp_path / "npu", variant="npu", context=64, prefill=8).path
    monkeypatch.setattr(adapter, "find_spec", lambda name: None)
    assert TARGETS["onnx"].seconds(path) == []
