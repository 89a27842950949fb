"""Weights read back from graphs that others might have made, and files that are not whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.formats.onnx import canonical_name, tensors
from gemexport.formats.onnx.blocks import pack, pack_signed
from gemexport.formats.onnx.stored import raw
from gemexport.formats.storage.errors import InputError

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

OUT, IN, BLOCK = 6, 64, 32
WEIGHT = "model.layers.0.mlp.up_proj.weight"
RANDOM = np.random.default_rng(0)
CODES = RANDOM.integers(-8, 8, (OUT, IN)).astype(np.int8)
SCALES = RANDOM.random((OUT, IN // BLOCK)).astype(np.float32)
VALUES = CODES * np.repeat(SCALES, BLOCK, 1)


def save(path: Path, nodes: list[Any], initializers: list[Any], producer: str = "test", **external: Any) -> Path:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, IN])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], initializers)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name=producer)
    onnx.save(model, path, **external)
    return path


def tensor(name: str, array: np.ndarray, kind: str | None = None, shape: tuple[int, ...] | None = None) -> Any:
    if kind is None:
        return onnx.numpy_helper.from_array(array, name)
    return onnx.helper.make_tensor(name, getattr(onnx.TensorProto, kind), shape, array.tobytes(), raw=True)


def node(kind: str, *inputs: str, output: str = "y", domain: str = "", **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, list(inputs), [output], domain=domain, **attributes)


def matmul_nbits(weight: str, **attributes: Any) -> Any:
    inputs = ["x", weight, "s", *(["z"] if attributes.pop("zero_points", False) else [])]
    return node("MatMulNBits", *inputs, domain="com.microsoft", N=OUT, K=IN, bits=4, block_size=BLOCK, **attributes)


def packed(name: str) -> Any:
    return tensor(name, pack(CODES, 4).reshape(OUT, IN // BLOCK, -1))


def test_fused_weights_under_the_builders_name(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.MatMul.weight_Q4"
    path = save(tmp_path / "model.onnx", [matmul_nbits(name)], [packed(name), tensor("s", SCALES.reshape(-1))])
    found = tensors(path)
    assert list(found) == [WEIGHT]
    assert found[WEIGHT].grid is not None
    assert np.array_equal(found[WEIGHT].numpy(), VALUES)


def test_fused_weights_with_zero_points(tmp_path: Path) -> None:
    zero_points = RANDOM.integers(0, 16, (OUT, IN // BLOCK)).astype(np.uint8)
    stored = zero_points[:, 0::2] | zero_points[:, 1::2] << 4
    initializers = [packed(WEIGHT), tensor("s", SCALES), tensor("z", stored)]
    path = save(tmp_path / "model.onnx", [matmul_nbits(WEIGHT, zero_points=True)], initializers)
    found = tensors(path)[WEIGHT]
    assert found.grid is not None
    assert found.grid.kind == "zero-point"
    assert np.array_equal(found.rows(0, OUT).shifts, zero_points)
    wanted = (CODES - np.repeat(zero_points.astype(np.float32) - 8, BLOCK, 1)) * np.repeat(SCALES, BLOCK, 1)
    assert np.array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("kind", ["INT4", "UINT4"])
@pytest.mark.parametrize("turned", [False, True])
def test_dequantized_blocks_either_way_round(tmp_path: Path, kind: str, turned: bool) -> None:
    codes, scales = (CODES.T, SCALES.T) if turned else (CODES, SCALES)
    bits = (pack_signed if kind == "INT4" else pack)(np.ascontiguousarray(codes), 4)
    nodes = [node("DequantizeLinear", WEIGHT, "s", "z", output="w", axis=0 if turned else 1, block_size=BLOCK)]
    if turned:
        nodes.append(node("MatMul", "x", "w"))
    else:
        nodes += [node("Transpose", "w", output="t", perm=[1, 0]), node("MatMul", "x", "t")]
    middle = np.full(scales.shape, 0 if kind == "INT4" else 8, np.int8)
    zero_points = pack_signed(middle.reshape(-1), 4)
    initializers = [
        tensor(WEIGHT, bits, kind, codes.shape),
        tensor("s", np.ascontiguousarray(scales)),
        tensor("z", zero_points, kind, scales.shape),
    ]
    found = tensors(save(tmp_path / "model.onnx", nodes, initializers))[WEIGHT]
    assert found.shape == (OUT, IN)
    assert found.grid is not None
    assert np.array_equal(found.numpy(), VALUES)


def test_one_scale_a_channel(tmp_path: Path) -> None:
    scales = SCALES[:, 0]
    nodes = [node("DequantizeLinear", WEIGHT, "s", output="w", axis=1), node("MatMul", "x", "w")]
    initializers = [tensor(WEIGHT, np.ascontiguousarray(CODES.T)), tensor("s", scales)]
    found = tensors(save(tmp_path / "model.onnx", nodes, initializers))[WEIGHT]
    assert found.grid is not None
    assert (found.grid.bits, found.grid.block) == (8, IN)
    assert np.array_equal(found.numpy(), CODES * scales[:, None])


def test_plain_weights_through_a_cast(tmp_path: Path) -> None:
    values = VALUES.astype(np.float16)
    nodes = [node("Cast", WEIGHT, output="w", to=onnx.TensorProto.FLOAT), node("MatMul", "x", "w")]
    path = save(tmp_path / "model.onnx", nodes, [tensor(WEIGHT, np.ascontiguousarray(values.T))])
    found = tensors(path)[WEIGHT]
    assert (found.shape, found.dtype) == ((OUT, IN), "f16")
    assert np.array_equal(found.rows(1, 4).values, values[1:4].astype(np.float32))


def test_the_builders_stacked_projections_norms_and_head(tmp_path: Path) -> None:
    """Four heads that share two: rows of the one projection are queries, keys and values in this order."""
    stacked = RANDOM.standard_normal((IN, 4 * 2 + 2 * 2 + 2 * 2)).astype(np.float32)
    names = [
        "model.layers.0.attn.qkv_proj.MatMul.weight",
        "model.layers.0.input_layernorm.weight",
        "lm_head.MatMul.weight",
    ]
    nodes = [
        node("MatMul", "x", names[0], output="q"),
        onnx.helper.make_node(
            "GroupQueryAttention",
            ["q"],
            ["y"],
            "/model/layers.0/attn/GroupQueryAttention",
            domain="com.microsoft",
            num_heads=4,
            kv_num_heads=2,
        ),
        node("MatMul", "x", names[2], output="logits"),
    ]
    initializers = [tensor(names[0], stacked), tensor(names[1], np.full(3, 1.5, np.float32)), tensor(names[2], stacked)]
    path = save(tmp_path / "model.onnx", nodes, initializers, producer="onnxruntime-genai")
    (tmp_path / "genai_config.json").write_text('{"model": {"type": "gemma3_text"}}', "utf-8")
    found = tensors(path)
    assert [found[f"model.layers.0.self_attn.{kind}_proj.weight"].shape[0] for kind in "qkv"] == [8, 4, 4]
    assert np.array_equal(found["model.layers.0.self_attn.v_proj.weight"].rows(1, 3).values, stacked.T[13:15])
    assert np.array_equal(found["model.layers.0.input_layernorm.weight"].numpy(), np.full(3, 0.5, np.float32))
    assert np.array_equal(found["model.embed_tokens.weight"].numpy(), stacked.T)
    assert "lm_head.weight" not in found


def test_names() -> None:
    assert canonical_name("model.layers.3.attn.q_norm.layernorm.weight") == "model.layers.3.self_attn.q_norm.weight"
    assert canonical_name("model.layers.18.final_norm_layernorm.weight") == "model.norm.weight"
    assert canonical_name("model.layers.3.layer_scalar") == "model.layers.3.layer_scalar"
    assert canonical_name("/model/constants/FLOAT/8.0") is None
    assert canonical_name(f"{WEIGHT}.scales") is None


def external(folder: Path) -> Path:
    options = {"save_as_external_data": True, "location": "weights.data", "size_threshold": 0}
    return save(folder / "model.onnx", [matmul_nbits(WEIGHT)], [packed(WEIGHT), tensor("s", SCALES)], **options)


def test_external_data_are_mapped(tmp_path: Path) -> None:
    assert np.array_equal(tensors(external(tmp_path))[WEIGHT].numpy(), VALUES)


def test_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = external(tmp_path)
    data, graph = (tmp_path / "weights.data").read_bytes(), path.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            tensors(tmp_path)[WEIGHT].numpy()
        assert "\n" not in str(caught.value)

    (tmp_path / "weights.data").write_bytes(data[:100])
    refused("too short")
    (tmp_path / "weights.data").unlink()
    refused("missing")
    (tmp_path / "weights.data").write_bytes(data)
    path.write_bytes(graph.replace(b"weights.data", b"../eights.da"))
    refused("outside the folder")
    path.write_bytes(graph[:50])
    refused("not a whole ONNX model")
    path.unlink()
    refused("no ONNX model")


def test_graphs_of_one_folder_must_agree(tmp_path: Path) -> None:
    for name, scales in (("prefill", "a.data"), ("decode", "b.data")):
        options = {"save_as_external_data": True, "location": scales, "size_threshold": 0}
        save(tmp_path / f"{name}.onnx", [matmul_nbits(WEIGHT)], [packed(WEIGHT), tensor("s", SCALES)], **options)
    with pytest.raises(InputError, match="another one"):
        tensors(tmp_path)


def test_a_file_is_opened_once_however_many_tensors_lie_in_it(tmp_path: Path) -> None:
    # Each mapping keeps its file open: Gemma 3n's graphs for NPUs have more tensors than a process may have open files.
    (tmp_path / "m.data").write_bytes(bytes(range(200)))
    kept, before = [], len(list(Path("/dev/fd").iterdir()))
    for place in range(200):
        stored = ir.ExternalTensor(
            "m.data", place, 1, ir.DataType.UINT8, name=f"t{place}", shape=ir.Shape([1]), base_dir=str(tmp_path)
        )
        value = ir.Value(name=stored.name, const_value=stored)
        kept.append(raw(value, tmp_path / "m.onnx"))
    assert [int(found[0]) for found in kept] == list(range(200))
    assert len(list(Path("/dev/fd").iterdir())) <= before + 2
