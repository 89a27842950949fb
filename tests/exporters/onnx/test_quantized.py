"""The NPU's integer graphs: every activation is quantized, ranges fit, weights and given scales arrive as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.formats.activations.ranges import ActivationRanges, Activations, read_ranges, static
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import round_to

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
exporter = pytest.importorskip("gemexport.exporters.onnx")
quantized = pytest.importorskip("gemexport.exporters.onnx.quantized")
calibration = pytest.importorskip("gemexport.exporters.onnx.calibration")
tensors = pytest.importorskip("gemexport.formats.onnx").tensors

TOKENS = np.random.default_rng(1).integers(10, 250, 100).tolist()
SIZES: dict[str, Any] = {"context": 64, "prefill": 8}
MOVES = {"Concat", "Gather", "Reshape", "Slice", "Split", "Transpose", "Unsqueeze", "Where"}
INTEGER = {"And", "GreaterOrEqual", "Less", "Max"}


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    found: Checkpoint = request.getfixturevalue(request.param)
    return found


def export(checkpoint: Checkpoint, path: Path, variant: str = "npu-a16", **options: Any) -> Path:
    result: Path = exporter.export(
        checkpoint, path, variant=variant, **{"calibration": [TOKENS], **SIZES, **options}
    ).path
    return result


@pytest.fixture(scope="module")
def made(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint as `npu-a16`."""
    path = tmp_path_factory.mktemp("made") / "npu-a16"
    return exporter.export(checkpoint, path, variant="npu-a16", calibration=[TOKENS], **SIZES)


def decoders(path: Path) -> dict[str, Any]:
    return {name: onnx.load(path / f"{name}.onnx", load_external_data=False).graph for name in ("prefill", "decode")}


@pytest.mark.parametrize("variant", ["npu-a8", "npu-a16"])
def test_every_operator_on_activations_reads_and_writes_integers(two_layers: Any, tmp_path: Path, variant: str) -> None:
    path = export(two_layers(), tmp_path / variant, variant)
    for name, graph in decoders(path).items():
        onnx.checker.check_model(str(path / f"{name}.onnx"))
        made_by = {name: node for node in graph.node for name in node.output}
        read_by: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                read_by.setdefault(name, []).append(node)
        floats = [node for node in graph.node if any(is_float(name, made_by) for name in node.input)]
        assert {"MatMul", "RMSNormalization", "Softmax", "Gelu", "Add", "Mul", *MOVES} <= {n.op_type for n in floats}
        for node in floats:
            if node.op_type == "QuantizeLinear":
                continue
            for name in node.output:
                assert [reader.op_type for reader in read_by[name]] == ["QuantizeLinear"], node.name


def is_float(name: str, made_by: dict[str, Any]) -> bool:
    return name in made_by and made_by[name].op_type == "DequantizeLinear"


def test_integers_with_another_scale_are_another_initializer(made: Any) -> None:
    """QNN's provider knows a constant by its name: one scale would serve for all that share it."""
    for graph in decoders(made.path).values():
        constants = {item.name for item in graph.initializer}
        scales: dict[str, set[tuple[str, ...]]] = {}
        for node in graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in constants:
                scales.setdefault(node.input[0], set()).add(tuple(node.input[1:]))
        assert scales
        assert all(len(found) == 1 for found in scales.values())


def test_both_graphs_share_scales_and_weights(made: Any) -> None:
    prefill, decode = decoders(made.path).values()
    stored = [{item.name: item.SerializeToString() for item in graph.initializer} for graph in (prefill, decode)]
    differ = {name for name in stored[0].keys() & stored[1].keys() if stored[0][name] != stored[1][name]}
    assert all(name.startswith("/constants/") for name in differ)  # sizes and positions
    assert {name for name in stored[0] if name.startswith("model.")} <= stored[1].keys()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_scale_a_row_passes_through(two_layers: Any, tmp_path: Path, bits: int) -> None:
    checkpoint = two_layers(bits=bits)
    path = export(checkpoint, tmp_path / "npu-a16")
    found = tensors(path)
    assert set(found) == set(checkpoint.tensors)
    for name, wanted in checkpoint.tensors.items():
        if wanted.grid is not None:
            np.testing.assert_array_equal(found[name].numpy(), wanted.numpy(), err_msg=name)


def test_blocks_become_rows_of_8_bits_and_the_lookup_keeps_them(checkpoint: Checkpoint, made: Any) -> None:
    assert any("requantized to 8 bits" in note for note in made.notes)
    found = tensors(made.path)
    assert set(found) == set(checkpoint.tensors)
    for name, wanted in checkpoint.tensors.items():
        source, stored = wanted.numpy(), found[name].numpy()
        if "embed_tokens" in name:
            np.testing.assert_array_equal(round_to(stored, wanted.dtype), source)
        elif source.ndim == 2:
            step = np.abs(source).max(axis=1, keepdims=True) / 127
            assert (np.abs(stored - source) <= step * (0.5 + 1e-4)).all(), name
        else:
            # 16 bits from zero to the largest weight, the family's offset included.
            offset = checkpoint.architecture.norm_offset if "norm" in name else 0.0
            span = max((source + offset).max(), 0) - min((source + offset).min(), 0)
            assert np.abs(stored - source).max() <= span / 65535, name


def test_the_same_input_gives_the_same_bytes_from_ranges_as_well(two_layers: Any, tmp_path: Path) -> None:
    checkpoint = two_layers()
    first = export(checkpoint, tmp_path / "first")
    again = export(checkpoint, tmp_path / "again")
    given = export(checkpoint, tmp_path / "given", calibration=(), ranges=first / quantized.RANGES)
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
        assert file.read_bytes() == (given / file.name).read_bytes(), file.name


def test_without_tokens_or_ranges_there_are_no_scales(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no static scales"):
        export(checkpoint, tmp_path / "npu-a16", calibration=())
    assert not (tmp_path / "npu-a16").exists()


def test_given_scales_stand_in_the_graph(two_layers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's own scales on what linears read and write and on caches, as int8 would have them."""
    checkpoint = two_layers()
    module = "model.layers.1.self_attn"
    keys = [f"{module}.q_proj.input", f"{module}.q_proj.output", f"{module}.key_cache"]
    given = {key: static(0.03125 * (i + 1)) for i, key in enumerate(keys)}
    settings = Activations(bits=16, linear_bits=16, cache_bits=16, given=given)
    monkeypatch.setitem(quantized.PRECISIONS, "npu-a16", settings)
    graph = decoders(export(checkpoint, tmp_path / "npu-a16"))["decode"]
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer if not item.external_data}
    made_by = {name: node for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    product = next(node for node in products if f"{module}.q_proj.weight" in made_by[node.input[1]].input)
    reading = made_by[product.input[0]]
    writing = next(node for node in graph.node if node.input[0] == product.output[0])
    for node, key in ((reading, keys[0]), (writing, keys[1])):
        scale, zero = (constants[name] for name in node.input[1:])
        assert (float(scale), int(zero), zero.dtype) == (given[key].scale, 128, np.uint8)
    cache = next(item for item in graph.input if item.name == "past_key_values.1.key")
    assert cache.type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_ranges_hold_what_was_seen(two_layers: Any, tmp_path: Path) -> None:
    path = export(two_layers(), tmp_path / "npu-a16")
    found: ActivationRanges = read_ranges(path / quantized.RANGES)
    assert found.tokens == 104  # twelve pieces of eight, and one that reaches back
    for key, item in found.ranges.items():
        assert item.minimum <= item.low <= item.high <= item.maximum, key
    scores = found.ranges["model.layers.0.self_attn.scores"]
    # Sixteen keys: so far below the lowest maximum of a row they come to less than 2^-16 together.
    assert scores.maximum - scores.minimum >= np.log(16) + 16 * np.log(2)
    assert {"inputs_embeds", "model.norm.output", "model.layers.1.mlp.down_proj.output"} <= found.ranges.keys()


def test_pieces_cover_every_token_and_none_is_padding() -> None:
    for count, length, context in ((20, 8, 16), (16, 8, 8), (3, 8, 16), (8, 8, 64)):
        tokens = list(range(count))
        pieces = list(calibration.chunks([tokens[:2], tokens[2:]], length, context))
        assert {token for piece, _ in pieces for token in piece} == set(tokens)
        assert all(len(piece) == length and start + length <= max(context, length) for piece, start in pieces)
    with pytest.raises(ValueError, match="no tokens"):
        list(calibration.chunks([[]], 8, 16))


def test_a_capped_attention_has_integers_too(two_layers: Any, tmp_path: Path) -> None:
    checkpoint = two_layers()
    decoder = checkpoint.architecture.model_copy(update={"attention_softcap": 0.5})
    capped = replace(checkpoint, model=replace(checkpoint.model, decoder=decoder))
    graph = decoders(export(capped, tmp_path / "npu-a16"))["prefill"]
    assert sum(node.op_type == "Tanh" for node in graph.node) >= len(capped.architecture.layers)


def test_ranges_serve_every_precision(two_layers: Any, tmp_path: Path) -> None:
    """Those that are measured in a step of their own are what each export would measure itself."""
    checkpoint = two_layers()
    (tmp_path / "scratch").mkdir()  # left by a run that was killed
    exporter.ranges(checkpoint, tmp_path / "scratch", [TOKENS], **SIZES).save(tmp_path / "ranges.json")
    assert not (tmp_path / "scratch").exists()
    assert tuple(quantized.PRECISIONS) == exporter.INTEGERS
    for variant in quantized.PRECISIONS:
        own = exporter.export(checkpoint, tmp_path / f"{variant}-own", variant=variant, calibration=[TOKENS], **SIZES)
        given = exporter.export(
            checkpoint, tmp_path / variant, variant=variant, ranges=tmp_path / "ranges.json", **SIZES
        )
        assert given.notes[0].endswith(" tokens, minmax")
        for file in sorted(own.path.glob("*.onnx*")):
            assert file.read_bytes() == (given.path / file.name).read_bytes(), f"{variant}: {file.name}"
