"""compressed-tensors folders that the library itself packed are read, and broken ones refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.formats import compressed_tensors
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.compressed_tensors.settings import quantization
from gemexport.formats.modules import Module
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.minifloat import E2M1, E2M3, E4M3
from gemexport.formats.storage.safetensors import Entry, MappedArray, MappedFile

torch = pytest.importorskip("torch")
library = pytest.importorskip("compressed_tensors.compressors")

MODULE = "model.layers.1.mlp.down_proj"
PACK = "pack-quantized"
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def _qparams(weight: Any, args: Any) -> dict[str, Any]:
    """Scales, and whatever else the arguments ask for, of a strategy."""
    out, width = weight.shape
    if args.strategy == "block":
        high, wide = args.block_structure
        rows, columns = -(-out // high), -(-width // wide)
        peaks = torch.zeros(rows, columns)
        for i in range(rows):
            for j in range(columns):
                peaks[i, j] = weight[i * high : (i + 1) * high, j * wide : (j + 1) * wide].abs().max()
        return {"weight_scale": peaks / 448}
    if args.strategy == "tensor":
        return {"weight_scale": weight.abs().max().reshape(1) / (448 if args.type == "float" else 127)}
    groups = weight.reshape(out, -1, args.group_size or width)
    if args.type == "float":
        peak = {4: 6.0, 6: 7.5, 8: 448.0}[args.num_bits]
        scale = groups.abs().amax(-1) / peak
        if args.strategy == "tensor_group":
            factor = torch.tensor([448 / scale.max()])
            return {"weight_scale": (scale * factor).to(torch.float8_e4m3fn).float(), "weight_global_scale": factor}
        return {"weight_scale": torch.exp2(torch.ceil(torch.log2(scale)))}
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = (high - low) / ((1 << args.num_bits) - 1) + 1e-6
    found = {"weight_scale": scale}
    if not args.symmetric:
        found["weight_zero_point"] = ((-low / scale).round() - (1 << (args.num_bits - 1))).to(torch.int8)
    return found


def _compress(source: Path, folder: Path, form: str = PACK, **arguments: Any) -> np.ndarray:
    """A folder with one module compressed by the library; returns what the library makes of it again, in f32."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from safetensors.torch import save_file

    checkpoint = open_checkpoint(source)
    state = {name: torch.from_numpy(tensor.numpy().copy()) for name, tensor in checkpoint.tensors.items()}
    weight = state.pop(f"{MODULE}.weight")
    args = QuantizationArgs(**{"type": "int", **arguments})
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor = library.BaseCompressor.get_value_from_registry(form)
    packed = compressor.compress({"weight": weight, **_qparams(weight, args)}, scheme)
    state |= {f"{MODULE}.{name}": value.contiguous() for name, value in packed.items()}
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    _configure(folder, checkpoint.config, json.loads(scheme.model_dump_json()), form)
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    found: np.ndarray = compressor.decompress(dict(packed), scheme)["weight"].float().numpy()
    return found


def _configure(folder: Path, config: dict[str, Any], group: dict[str, Any], form: str, **more: Any) -> None:
    quantization = {"config_groups": {"group_0": group}, "format": form, "quant_method": "compressed-tensors", **more}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


@pytest.mark.parametrize(
    ("form", "arguments", "kind", "block"),
    [
        (PACK, INT4, "symmetric", 32),
        (PACK, {"num_bits": 8, "strategy": "channel"}, "symmetric", 96),
        (PACK, {"num_bits": 3, "strategy": "group", "group_size": 16}, "symmetric", 16),
        (PACK, {**INT4, "symmetric": False}, "zero-point", 32),
        (PACK, {"num_bits": 5, "strategy": "channel", "symmetric": False}, "zero-point", 96),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}, "symmetric", 96),
        ("int-quantized", {"num_bits": 8, "strategy": "tensor"}, "symmetric", 96),
        ("naive-quantized", {**INT4, "symmetric": False}, "zero-point", 32),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, "codebook", 96),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, "codebook", 96),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 40]},
            "codebook",
            8,
        ),
    ],
)
def test_what_the_library_packed(
    tiny_gemma3: Path, tmp_path: Path, form: str, arguments: dict[str, Any], kind: str, block: int
) -> None:
    expected = _compress(tiny_gemma3, tmp_path / "ct", form, **arguments)
    checkpoint = open_checkpoint(tmp_path / "ct")
    tensor = checkpoint.tensors[f"{MODULE}.weight"]
    np.testing.assert_array_equal(tensor.numpy(), expected)
    np.testing.assert_array_equal(tensor.rows(3, 47).values, expected[3:47])
    assert tensor.grid is not None
    assert (tensor.grid.bits, tensor.grid.kind, tensor.grid.block) == (arguments["num_bits"], kind, block)
    assert tensor.dtype == "f32"
    assert checkpoint.left_out == ()
    assert "quantization_config" not in checkpoint.config


def test_a_target_is_a_module_or_a_class(tmp_path: Path) -> None:
    """`lm_head` is no class of linears, wherever in the file its group stands: so the library tells them apart."""
    groups = {
        "group_0": {"targets": ["lm_head"], "weights": {"num_bits": 2}},
        "group_1": {"targets": ["Linear"], "weights": {"num_bits": 4}},
    }
    found = quantization(tmp_path, {"quantization_config": {"config_groups": groups, "format": PACK}})

    def bits(name: str) -> int:
        stored = MappedArray(MappedFile(tmp_path), Entry(f"{name}.weight_packed", "I32", (1, 1)), 0)
        scheme = found.scheme(Module(f"{name}.weight", (1, 1), {"weight_packed": stored}))
        assert scheme is not None
        assert scheme.weights is not None
        return scheme.weights.num_bits

    assert (bits("lm_head"), bits(MODULE)) == (2, 4)


def test_targets_of_a_multimodal_model_name_its_modules_as_loaded(tmp_path: Path) -> None:
    """llm-compressor calls them model.language_model…, which Gemma 3 saves as language_model.model…; names go first."""
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 2}},
        "group_1": {"targets": [r"re:model\.language_model\.layers\.\d+\.mlp.*"], "weights": {"num_bits": 3}},
        "group_2": {"targets": [MODULE.replace("model.", "model.language_model.")], "weights": {"num_bits": 4}},
    }
    found = quantization(tmp_path, {"quantization_config": {"config_groups": groups, "format": PACK}})

    def bits(name: str) -> int | None:
        stored = MappedArray(MappedFile(tmp_path), Entry(f"language_model.{name}.weight_packed", "I32", (1, 1)), 0)
        scheme = found.scheme(Module(f"{name}.weight", (1, 1), {"weight_packed": stored}))
        return scheme.weights.num_bits if scheme and scheme.weights else None

    assert bits(MODULE) == 4
    assert bits(MODULE.replace("down", "up")) == 3
    assert bits("model.layers.1.self_attn.q_proj") == 2


@pytest.mark.parametrize(
    ("form", "arguments", "levels"),
    [
        ("mxfp4-pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group", "scale_dtype": "uint8"}, E2M1),
        ("mxfp6-pack-quantized", {"num_bits": 6, "group_size": 32, "strategy": "group", "scale_dtype": "uint8"}, E2M3),
        ("mxfp8-quantized", {"num_bits": 8, "group_size": 32, "strategy": "group", "scale_dtype": "uint8"}, E4M3),
        ("nvfp4-pack-quantized", {"num_bits": 4, "group_size": 16, "strategy": "tensor_group"}, E2M1),
    ],
)
def test_small_floats(
    tiny_gemma3: Path, tmp_path: Path, form: str, arguments: dict[str, Any], levels: tuple[float, ...]
) -> None:
    if "scale_dtype" in arguments:
        arguments = {**arguments, "scale_dtype": torch.uint8}
    expected = _compress(tiny_gemma3, tmp_path / "ct", form, type="float", **arguments)
    tensor = compressed_tensors.tensors(tmp_path / "ct")[f"{MODULE}.weight"]
    assert tensor.grid is not None
    assert tensor.grid.block == arguments["group_size"]
    if form.startswith("nvfp4"):  # the library rounds its product to bfloat16
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=2**-8)
        assert tensor.grid.levels != levels
        assert tensor.grid.levels[2] * 6 == tensor.grid.levels[7]
    else:
        np.testing.assert_array_equal(tensor.numpy(), expected)
        assert tensor.grid.levels == levels


def test_columns_in_activation_order(tiny_gemma3: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    expected = _compress(tiny_gemma3, tmp_path / "ct", **{**INT4, "symmetric": False})
    file = tmp_path / "ct" / "model.safetensors"
    state = load_file(file)
    # Groups in another order, each of consecutive columns: still blocks of 32.
    state[f"{MODULE}.weight_g_idx"] = torch.arange(96, dtype=torch.int32).flip(0) // 32
    save_file(state, file)
    found = open_checkpoint(tmp_path / "ct")
    tensor = found.tensors[f"{MODULE}.weight"]
    assert tensor.grid is not None
    assert tensor.grid.block == 32
    assert found.notes == ()
    # One column of another group leaves nothing in common but single columns.
    state[f"{MODULE}.weight_g_idx"] = torch.arange(96, dtype=torch.int32) // 32
    save_file(state, file)
    np.testing.assert_array_equal(compressed_tensors.tensors(tmp_path / "ct")[tensor.name].numpy(), expected)
    state[f"{MODULE}.weight_g_idx"][5] = 2
    save_file(state, file)
    found = open_checkpoint(tmp_path / "ct")
    tensor = found.tensors[f"{MODULE}.weight"]
    assert tensor.grid is not None
    assert tensor.grid.block == 1
    assert "activation order" in found.notes[0]
    kept = [column for column in range(96) if column != 5]
    np.testing.assert_array_equal(tensor.numpy()[:, kept], expected[:, kept])
    rows, scale = tensor.rows(0, 9), state[f"{MODULE}.weight_scale"].numpy()[:9, 2]
    assert rows.shifts is not None
    codes, zeros = rows.grid()[0][:, 5].astype(float), rows.shifts[:, 5]
    np.testing.assert_allclose(rows.values[:, 5], (codes - zeros) * scale, rtol=1e-6)
    state[f"{MODULE}.weight_g_idx"][5] = 3
    save_file(state, file)
    with pytest.raises(InputError, match="does not make"):
        open_checkpoint(tmp_path / "ct")


def test_modules_are_found_by_name_pattern_and_class(tiny_gemma3: Path, tmp_path: Path) -> None:
    # A row of 8 codes takes one word whether they have 2, 3 or 4 bits: only the scheme tells.
    expected = _compress(tiny_gemma3, tmp_path / "ct", **INT4)
    config = open_checkpoint(tiny_gemma3).config
    right, wrong = {**INT4}, {**INT4, "num_bits": 8}
    for target in (MODULE, "re:.*down_proj", "re:model.*mlp.down", "Linear"):
        groups = {
            "group_0": {"targets": ["Embedding", "model.layers.0.mlp.down_proj"], "weights": wrong},
            "group_1": {"targets": [target], "weights": right},
        }
        _configure(tmp_path / "ct", config, {}, PACK, config_groups=groups)
        np.testing.assert_array_equal(compressed_tensors.tensors(tmp_path / "ct")[f"{MODULE}.weight"].numpy(), expected)
    _configure(tmp_path / "ct", config, {"targets": ["Linear"], "weights": wrong}, PACK)
    with pytest.raises(InputError, match=r"down_proj.weight is stored as \[64, 12\], which does not make \[64, 96\]"):
        compressed_tensors.tensors(tmp_path / "ct")


def test_what_is_left_out_is_noted(tiny_gemma3: Path, tmp_path: Path) -> None:
    _compress(tiny_gemma3, tmp_path / "ct", **INT4)
    config = open_checkpoint(tiny_gemma3).config
    static, dynamic = {"num_bits": 8, "strategy": "tensor"}, {"num_bits": 8, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": INT4, "input_activations": dynamic, "output_activations": static}
    _configure(tmp_path / "ct", config, group, PACK, kv_cache_scheme={"num_bits": 8, "type": "float"})
    assert open_checkpoint(tmp_path / "ct").notes == (
        "the input activations (8-bit int, dynamic) of 1 modules are left out",
        "the output activations (8-bit int, static) of 1 modules are left out",
        "the KV cache scheme (8-bit float, static) is left out",
    )


def _damaged(folder: Path, drop: str = "", flat: str = "", add: str = "", value: Any = None) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state.pop(drop, None)
    if flat:
        state[flat] = state[flat].reshape(-1)
    if add:
        state[add] = torch.zeros(1) if value is None else value
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"drop": f"{MODULE}.weight_packed"}, "is missing"),
        ({"drop": f"{MODULE}.weight_scale"}, "without scales"),
        ({"flat": f"{MODULE}.weight_scale"}, "does not make"),
        ({"flat": f"{MODULE}.weight_packed"}, "does not make"),
        ({"flat": "model.layers.0.mlp.up_proj.weight"}, "has the shape"),
        ({"add": f"{MODULE}.weight_g_idx", "value": torch.tensor([0])}, "does not make"),
        ({"add": f"{MODULE}.weight_scale", "value": torch.zeros(64, 3, dtype=torch.int32)}, "has scales of I32"),
        ({"add": f"{MODULE}.weight_scale", "value": torch.zeros(64, 7)}, "does not make"),
        ({"add": f"{MODULE}.weight_shape", "value": torch.tensor([96, 64])}, r"is a packed \[96, 64\] where"),
        ({"add": f"{MODULE}.weight_zero_point"}, "does not make"),
        ({"add": f"{MODULE}.weight_global_scale"}, "has a global scale of 0.0"),
        ({"add": f"{MODULE}.bias", "value": torch.ones(64)}, "has a bias"),
        ({"add": f"{MODULE}.weight", "value": torch.ones(64, 96)}, "is there twice, packed and as it is"),
        ({"add": "model.layers.0.mlp.up_proj.weight_scale"}, "is to be rounded while the model runs"),
    ],
)
def test_broken_folders(tiny_gemma3: Path, tmp_path: Path, damage: dict[str, Any], message: str) -> None:
    form = {"form": "nvfp4-pack-quantized"} if "global" in str(damage.get("add")) else {}
    float4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
    _compress(tiny_gemma3, tmp_path / "ct", **form, **(float4 if form else INT4))
    _damaged(tmp_path / "ct", **damage)
    with pytest.raises(InputError, match=message):
        compressed_tensors.tensors(tmp_path / "ct")


def test_a_bias_of_zeros_is_none(tiny_gemma3: Path, tmp_path: Path) -> None:
    expected = _compress(tiny_gemma3, tmp_path / "ct", **INT4)
    _damaged(tmp_path / "ct", add=f"{MODULE}.bias", value=torch.zeros(64))
    found = open_checkpoint(tmp_path / "ct")
    assert found.left_out == ()
    np.testing.assert_array_equal(found.tensors[f"{MODULE}.weight"].numpy(), expected)


def test_numbers_that_are_no_weights(tiny_gemma3: Path, tmp_path: Path) -> None:
    _compress(tiny_gemma3, tmp_path / "ct", "float-quantized", num_bits=8, type="float", strategy="channel")
    nan = torch.full((64, 96), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    _damaged(tmp_path / "ct", add=f"{MODULE}.weight", value=nan)
    with pytest.raises(InputError, match="has NaN weights"):
        compressed_tensors.tensors(tmp_path / "ct")[f"{MODULE}.weight"].numpy()
    _compress(tiny_gemma3, tmp_path / "int", "naive-quantized", **INT4)
    _damaged(tmp_path / "int", add=f"{MODULE}.weight", value=torch.full((64, 96), 9, dtype=torch.int8))
    with pytest.raises(InputError, match="more than the 4 bits"):
        compressed_tensors.tensors(tmp_path / "int")[f"{MODULE}.weight"].numpy()


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"format": "marlin-24", "config_groups": {"a": {"targets": []}}}, "marlin-24 of compressed-tensors is not"),
        ({"config_groups": {"a": {"targets": ["re:("]}}}, "is no regular expression"),
        ({"config_groups": {"a": {}}}, "not understood .*targets"),
        ({"config_groups": 3}, "not understood"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "rotates its activations"),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, "stored sparse"),
        ([], "not understood"),
    ],
)
def test_settings_that_are_refused(tiny_gemma3: Path, tmp_path: Path, quantization: Any, message: str) -> None:
    _compress(tiny_gemma3, tmp_path / "ct", **INT4)
    path = tmp_path / "ct" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": quantization or [1]}))
    with pytest.raises(InputError, match=message):
        compressed_tensors.tensors(tmp_path / "ct")


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no config\.json"):
        compressed_tensors.tensors(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="is not a JSON object"):
        compressed_tensors.tensors(tmp_path)


@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w8a8-static"])
def test_what_llm_compressor_saved(golden: Path, name: str) -> None:
    """tests/golden: whole checkpoints, against the library's own decompression of every module."""
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    folder = golden / f"llm-compressor-{name}"
    config = json.loads((folder / "config.json").read_text())
    settings = QuantizationConfig.model_validate(config["quantization_config"])
    (scheme,) = settings.config_groups.values()
    compressor = library.BaseCompressor.get_value_from_registry(scheme.format or settings.format)
    found = compressed_tensors.source(folder, config)
    state = load_file(folder / "model.safetensors")
    compared = 0
    for tensor in found.tensors.values():
        if tensor.grid is None:
            continue
        stem = tensor.name.removesuffix("weight")
        module = {key.removeprefix(stem): value for key, value in state.items() if key.startswith(stem)}
        module["weight_scale"] = module["weight_scale"].float()
        np.testing.assert_array_equal(tensor.numpy(), compressor.decompress(module, scheme)["weight"].numpy())
        compared += 1
    assert compared == 14
    kinds = {tensor.grid.kind for tensor in found.tensors.values() if tensor.grid}
    assert kinds == {"zero-point" if name.endswith("asym") else "symmetric"}


def test_zero_points_of_a_symmetric_grid_are_no_news(tiny_gemma3: Path, tmp_path: Path) -> None:
    expected = _compress(tiny_gemma3, tmp_path / "ct", **{**INT4, "symmetric": False})
    middle = torch.full((8, 3), -2004318072, dtype=torch.int32)  # 0x88888888: the signed 0 everywhere
    _damaged(tmp_path / "ct", add=f"{MODULE}.weight_zero_point", value=middle)
    rows = compressed_tensors.tensors(tmp_path / "ct")[f"{MODULE}.weight"].rows(0, 64)
    assert rows.shifts is None
    assert rows.grid()[0].dtype == np.int8
    assert expected.shape == rows.values.shape
