"""Gemma's mobile layout is read as transformers reads it, and broken checkpoints are refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemexport.demo import mobile as demo_mobile
from gemexport.formats import gemma_mobile
from gemexport.formats.quantized import read_through
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import MappedArray, read_folder
from gemexport.formats.tensor import DType

torch = pytest.importorskip("torch")
quant = pytest.importorskip("transformers.integrations.gemma_quant")
save_file = pytest.importorskip("safetensors.torch").save_file

DTYPES: dict[DType, Any] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
QUERY = "model.language_model.layers.0.self_attn.q_proj"
TABLE = "model.language_model.embed_tokens"


@st.composite
def matrices(draw: st.DrawFn) -> tuple[int, Any, Any, DType]:
    """Width of codes, stored codes of any bytes, scales of a row or of blocks."""
    bits = draw(st.sampled_from([2, 4, 8]))
    out, blocks = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3]))
    width = blocks * draw(st.integers(1, 13))
    stream = np.random.default_rng(draw(st.integers(0, 1000)))
    stored = stream.integers(0, 256, (out, -(-width * bits // 8)), dtype=np.uint8)
    scales = torch.from_numpy(stream.uniform(1e-4, 3, (out, blocks)).astype(np.float32))
    dtype: DType = draw(st.sampled_from(["f32", "bf16", "f16"]))
    codes = torch.from_numpy(stored if bits < 8 else stored.view(np.int8))
    return bits, (codes, width), scales.to(DTYPES[dtype]), dtype


@given(case=matrices())
@settings(max_examples=60, deadline=None)
def test_codes_and_scales_are_those_of_transformers(case: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    bits, (stored, width), scales, dtype = case
    folder = tmp_path_factory.mktemp("packed")
    save_file({"codes": stored, "scales": scales}, folder / "model.safetensors")
    arrays: dict[str, MappedArray] = read_folder(folder)
    shape = (stored.shape[0], width)
    found = gemma_mobile.PackedRows("w", shape, arrays["codes"], arrays["scales"], bits)
    unpack = {2: quant._unpack_int2, 4: quant._unpack_int4, 8: lambda codes, width: codes}[bits]
    codes = unpack(stored, width).numpy()
    wide = scales.float().repeat_interleave(width // scales.shape[1], dim=1).numpy()
    rows = found.rows(0, shape[0])
    assert found.grid.bits == bits
    assert found.grid.scale_dtype == dtype
    np.testing.assert_array_equal(rows.codes, codes)
    np.testing.assert_array_equal(rows.scales, scales.float().numpy())
    np.testing.assert_array_equal(rows.values, codes * wide)
    np.testing.assert_array_equal(found.rows(shape[0] // 2, shape[0]).values, (codes * wide)[shape[0] // 2 :])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mobile checkpoint. Do not write to it."""
    return demo_mobile.make(tmp_path_factory.mktemp("mobile") / "model", size="tiny")


def read(folder: Path) -> int:
    """Read all that is there; the number of weights."""
    return read_through(gemma_mobile.source(folder, json.loads((folder / "config.json").read_text())).tensors)


def changed(model: Path, folder: Path, **arrays: Any) -> Path:
    """A copy with other tensors; None takes one away."""
    from safetensors.torch import load_file

    shutil.copytree(model, folder)
    state = load_file(folder / "model.safetensors") | {name.replace("/", "."): item for name, item in arrays.items()}
    kept = {name: item.contiguous() for name, item in state.items() if item is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{QUERY}.weight", None, "is missing"),
        (f"{QUERY}.weight_scale", None, "is missing"),
        (f"{TABLE}.embedding_scale", None, "is missing"),
        (f"{QUERY}.weight", torch.zeros((64, 33), dtype=torch.uint8), "4 bits for"),
        (f"{QUERY}.weight", torch.zeros((64, 32), dtype=torch.int8), "4 bits for"),
        (f"{QUERY}.weight_scale", torch.ones((64,)), "no scale for each row"),
        (f"{QUERY}.weight_scale", torch.ones((64, 7)), "no scale for each row"),
        (f"{QUERY}.weight_scale", torch.ones((64, 1), dtype=torch.int8), "not as floats"),
        (f"{QUERY}.input_activation_scale", torch.tensor(-1.0), "not one number"),
        (f"{QUERY}.input_activation_scale", torch.tensor(float("nan")), "not one number"),
        (f"{QUERY}.output_activation_scale", torch.ones(64), "not one number"),
        ("model.language_model.norm.weight", torch.ones(63), "where config.json says"),
    ],
)
def test_broken_tensors(name: str, value: Any, message: str, model: Path, tmp_path: Path) -> None:
    folder = changed(model, tmp_path / "broken", **{name: value})
    with pytest.raises(InputError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_scales_of_activations(model: Path, tmp_path: Path) -> None:
    scale = torch.tensor(0.1234, dtype=torch.float32)
    other = {f"{QUERY}.input_activation_scale": scale, f"{QUERY}.output_activation_scale": torch.tensor(0.0)}
    folder = changed(model, tmp_path / "model", **other)
    found = gemma_mobile.source(folder, json.loads((folder / "config.json").read_text())).activations
    assert found is not None
    both = found.linear("model.layers.0.self_attn.q_proj.weight")
    assert both.input is not None
    assert both.input.scale == float(scale)
    assert both.output is None, "0 is a scale that was not calibrated"
    assert found.caches[0].key is not None


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("num_bits", 3, "quantization_config.num_bits"),
        ("module_quant_configs", {"layers\\.(": {"num_bits": 4}}, "is no regular expression"),
        ("module_quant_configs", {"mlp": {"bits": 4}}, "module_quant_configs.mlp.bits"),
        ("modules_to_not_convert", ["["], "is no regular expression"),
        ("module_quant_configs", {}, "bits for"),
        ("quantize_embeddings", False, "is missing"),
    ],
)
def test_broken_settings(setting: str, value: Any, message: str, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"][setting] = value
    with pytest.raises(InputError, match=message):
        read_through(gemma_mobile.source(model, config).tensors)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_damaged_files_are_refused_or_read(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bytes of the header changed at random: one line, or numbers, and never anything else."""
    folder = tmp_path_factory.mktemp("damaged")
    raw = bytearray(_whole(tmp_path_factory))
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    (folder / "model.safetensors").write_bytes(raw)
    shutil.copyfile(_MADE[0] / "config.json", folder / "config.json")
    complaint = ""
    try:
        read(folder)
    except InputError as error:
        complaint = str(error)
    assert "\n" not in complaint


_MADE: list[Path] = []


def _whole(factory: pytest.TempPathFactory) -> bytes:
    """The weights of a tiny checkpoint that was made once."""
    if not _MADE:
        _MADE.append(demo_mobile.make(factory.mktemp("whole") / "model", size="tiny", calibrated=False))
    return (_MADE[0] / "model.safetensors").read_bytes()
