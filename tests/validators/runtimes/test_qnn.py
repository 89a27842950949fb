"""Qualcomm's compiler takes the integer decoders whole, its emulator computes them, and what it refuses has a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.formats.storage.errors import InputError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
export = pytest.importorskip("gemexport.exporters.onnx").export
quantized = pytest.importorskip("gemexport.exporters.onnx.quantized")
qnn = pytest.importorskip("gemexport.validators.runtimes.qnn")
refusals = pytest.importorskip("gemexport.validators.runtimes.qnn.log").refusals

TOKENS = np.random.default_rng(3).integers(0, 256, 60).tolist()
SIZES: dict[str, Any] = {"context": 64, "prefill": 8}
needs_compiler = pytest.mark.skipif(qnn.unavailable() is not None, reason=str(qnn.unavailable()))

# As onnxruntime-qnn 2.7 writes it, apart from the lengths of some lines.
LOG = """\
before any graph
== prefill
2026-11-22 20:18:05.880 [V:onnxruntime:, qnn_model_wrapper.cc:557 CreateQnnNode] Qnn_OpConfig node name: /Norm_3 \
package_name: qti.aisw QNN_op_type: RmsNorm num_of_inputs: 2 num_of_outputs: 1 num_of_params: 2
 node_inputs:
 name=v3 id=0 version=1 type=QNN_TENSOR_TYPE_NATIVE dataFormat=0 dataType=QNN_DATATYPE_UFIXED_POINT_8 rank=3 \
dimensions=(1 8 64 ) memType=QNN_TENSORMEMTYPE_RAW
 name=c7 id=0 version=1 type=QNN_TENSOR_TYPE_STATIC dataFormat=0 dataType=QNN_DATATYPE_UFIXED_POINT_16 rank=1 \
dimensions=(64 ) memType=QNN_TENSORMEMTYPE_RAW
 node_outputs:
 name=v16 id=0 version=1 type=QNN_TENSOR_TYPE_NATIVE dataFormat=0 dataType=QNN_DATATYPE_UFIXED_POINT_8 rank=3 \
dimensions=(1 8 64 ) memType=QNN_TENSORMEMTYPE_RAW
 node_params:
 type=QNN_PARAMTYPE_TENSOR name=axes dataType=QNN_DATATYPE_UINT_32 rank=1 dimensions=(1 ) memType=RAW

\x1b[0;93m2026-11-22 20:18:05.881 [W:onnxruntime:, qnn_model_wrapper.cc:565 CreateQnnNode] \
QNN.backendValidateOpConfig() failed for node `/Norm_3` of type `RmsNorm` with error code 3110
\x1b[m
2026-11-22 20:18:05.881 [V:onnxruntime:, qnn_execution_provider.cc:1713 LogNodeSupport] Validation FAILED for 4 nodes \
in OrtNodeUnit (RMSNormalization) :
\tOperator type: DequantizeLinear Node name: /Dequantize_6 Node index: 1
\tOperator type: RMSNormalization Node name: /Norm_3 Node index: 3
\tOperator type: QuantizeLinear Node name: /Quantize_17 Node index: 4
\tREASON : Failed to add node.

2026-11-22 20:18:05.882 [V:onnxruntime:, qnn_execution_provider.cc:1713 LogNodeSupport] Validation PASSED for 1 nodes \
in OrtNodeUnit (Reshape) :
\tOperator type: Reshape Node name: /Reshape_1 Node index: 9
2026-11-22 20:18:05.883 [V:onnxruntime:, qnn_execution_provider.cc:1713 LogNodeSupport] Validation FAILED for 1 nodes \
in OrtNodeUnit (DequantizeLinear) :
\tOperator type: DequantizeLinear Node name: /Dequantize_9 Node index: 5
\tREASON : QNN EP does not support a standalone DQ op with per-channel quantization

2026-11-22 20:18:05.884 [V:onnxruntime:, qnn_execution_provider.cc:1713 LogNodeSupport] Validation FAILED for 1 nodes \
in OrtNodeUnit (DequantizeLinear) :
\tOperator type: DequantizeLinear Node name: /Dequantize_9 Node index: 5
\tREASON : the provider is asked twice

== decode
2026-11-22 20:18:05.885 [V:onnxruntime:, qnn_execution_provider.cc:1713 LogNodeSupport] Validation FAILED for 1 nodes \
in OrtNodeUnit (Cumsum) :
\tOperator type: Cumsum Node name: /Cumsum 1 Node index: 5
\tREASON : there is no builder for it
"""


def test_the_log_names_what_was_refused_and_why() -> None:
    found = {(item.graph, item.node, item.operator): item.reason for item in refusals(LOG)}
    assert found == {
        ("prefill", "/Norm_3", "RMSNormalization"): "Failed to add node. (RmsNorm of UFIXED_POINT_8[1,8,64], "
        "UFIXED_POINT_16[64] into UFIXED_POINT_8[1,8,64]: QNN error 3110)",
        ("prefill", "/Dequantize_9", "DequantizeLinear"): "QNN EP does not support a standalone DQ op with per-channel "
        "quantization",
        ("decode", "/Cumsum 1", "Cumsum"): "there is no builder for it",
    }


def test_where_there_is_no_compiler_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qnn, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install '.*\[npu\]'"):
        qnn.compile(tmp_path, tmp_path / "context")


@needs_compiler
@pytest.mark.parametrize("variant", ["npu-a8", "npu-a16"])
def test_a_decoder_compiles_whole_and_the_emulator_runs_it(two_layers: Any, tmp_path: Path, variant: str) -> None:
    path = export(two_layers(), tmp_path / variant, variant=variant, calibration=[TOKENS], **SIZES).path
    made = qnn.compile(path, tmp_path / "context")
    assert made.compiled
    assert (made.refused, made.errors) == ((), ())
    names = sorted(file.name for file in made.context.iterdir())
    assert names == ["decode.onnx", "decode_qnn.bin", "prefill.onnx", "prefill_qnn.bin"]
    assert made.context_bytes == sum((made.context / f"{name}_qnn.bin").stat().st_size for name in qnn.DECODER)
    again = qnn.compile(path, tmp_path / "again")
    for name in qnn.DECODER:
        assert (made.context / f"{name}_qnn.bin").read_bytes() == (again.context / f"{name}_qnn.bin").read_bytes()
    htp, cpu, _ = qnn.compare(path, made.context, TOKENS[:18], threads=1)
    assert (htp.of, htp.against, cpu.of, cpu.against) == ("htp", "exact", "cpu", "exact")
    # What QNN 2.51 rounds on the way, measured: 6e-4 with 16 bits, 0.02 with 8; a wrong constant gives some nats.
    assert htp.divergence.kld_mean < (5e-3 if variant == "npu-a16" else 0.1)
    assert cpu.divergence.kld_mean < (1e-5 if variant == "npu-a16" else 1e-2)


@needs_compiler
def test_what_is_refused_has_a_name_and_leaves_nothing(two_layers: Any, tmp_path: Path) -> None:
    """Weights in integers under activations in floating point are nothing for the HTP."""
    path = export(two_layers(), tmp_path / "npu", variant="npu", **SIZES).path
    made = qnn.compile(path, tmp_path / "context")
    assert not made.compiled
    assert {item.graph for item in made.refused} == {"prefill", "decode"}
    assert {item.operator for item in made.refused} == {"DequantizeLinear"}
    assert all("per-channel" in item.reason for item in made.refused)
    names = {node.name for node in onnx.load(path / "prefill.onnx", load_external_data=False).graph.node}
    assert {item.node for item in made.refused if item.graph == "prefill"} <= names
    assert [file.name for file in tmp_path.iterdir()] == ["npu"]


@needs_compiler
def test_a_folder_without_a_decoder_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no prefill\.onnx"):
        qnn.compile(tmp_path, tmp_path / "context")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("weights", [4, 8])
def test_all_the_widths_of_integers_compile(
    two_layers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, weights: int
) -> None:
    """8 bits everywhere, and 16 bits over a cache of 8."""
    monkeypatch.setitem(
        quantized.PRECISIONS, "npu-a16", quantized.Activations(bits=bits, linear_bits=bits, cache_bits=8)
    )
    checkpoint = two_layers(bits=weights)
    path = export(checkpoint, tmp_path / "npu", variant="npu-a16", calibration=[TOKENS], **SIZES).path
    made = qnn.compile(path, tmp_path / "context")
    assert made.compiled, (made.refused, made.errors)
    htp, *_ = qnn.compare(path, made.context, TOKENS[:18], threads=1)
    assert htp.divergence.kld_mean < (5e-3 if bits == 16 else 0.5)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["npu-a8", "npu-a16"])
def test_two_layers_of_e2bs_width_compile_whole(two_layers: Any, tmp_path: Path, variant: str) -> None:
    """E2B's own widths, head sizes, window and per-layer embeddings; the vocabulary is 1024."""
    checkpoint = two_layers(wide=True, vocab=1024)
    tokens = np.random.default_rng(4).integers(0, 1024, 128).tolist()
    sizes = {"context": 512, "prefill": 32}
    path = export(checkpoint, tmp_path / variant, variant=variant, calibration=[tokens], **sizes).path
    made = qnn.compile(path, tmp_path / "context")
    assert made.compiled, (made.refused, made.errors)
    htp, cpu, _ = qnn.compare(path, made.context, tokens[:33], threads=1)
    # Measured 3e-6 with 16 bits and 7e-4 with 8 on these logits, which are more peaked than a small model's.
    assert htp.divergence.kld_mean < (1e-4 if variant == "npu-a16" else 0.05)
    assert htp.divergence.top1_agreement > 0.9
    assert cpu.divergence.kld_mean < 1e-3
