"""compressed-tensors folders that the library itself packed are read, and broken ones refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.formats import compressed_tensors
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.errors import InputError

torch = pytest.importorskip("torch")
library = pytest.importorskip("compressed_tensors.compressors")

MODULE = "model.layers.1.mlp.down_proj"


def _compress(source: Path, folder: Path, form: str = "pack-quantized", **arguments: Any) -> np.ndarray:
    """A folder with one module compressed by the library; returns what the library makes of it again, in f32."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from safetensors.torch import save_file

    checkpoint = open_checkpoint(source)
    state = {name: torch.from_numpy(tensor.numpy().copy()) for name, tensor in checkpoint.tensors.items()}
    weight = state.pop(f"{MODULE}.weight")
    args = QuantizationArgs(type="int", **arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    block = args.group_size or weight.shape[1]
    groups = weight.reshape(weight.shape[0], -1, block)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    top = (1 << args.num_bits) - 1
    module = {"weight": weight, "weight_scale": (high - low) / top + 1e-6}
    if not args.symmetric:
        zero = (-low / module["weight_scale"]).round() - (1 << (args.num_bits - 1))
        module["weight_zero_point"] = zero.to(torch.int8)
    compressor = library.BaseCompressor.get_value_from_registry(form)
    packed = compressor.compress(module, scheme)
    state |= {f"{MODULE}.{name}": value.contiguous() for name, value in packed.items()}
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    groups_config = {"group_0": json.loads(scheme.model_dump_json())}
    quantization = {"config_groups": groups_config, "format": form, "quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps({**checkpoint.config, "quantization_config": quantization}))
    found: np.ndarray = compressor.decompress(dict(packed), scheme)["weight"].numpy()
    return found


@pytest.mark.parametrize(
    ("form", "arguments"),
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 16}),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    ],
    ids=["4 bit", "a row", "3 bit", "zero points", "int8"],
)
def test_what_the_library_packed(tiny_gemma3: Path, tmp_path: Path, form: str, arguments: dict[str, Any]) -> None:
    expected = _compress(tiny_gemma3, tmp_path / "ct", form, **arguments)
    tensor = compressed_tensors.tensors(tmp_path / "ct")[f"{MODULE}.weight"]
    np.testing.assert_array_equal(tensor.numpy(), expected)
    np.testing.assert_array_equal(tensor.rows(3, 7).values, expected[3:7])
    assert tensor.grid is not None
    assert tensor.grid.kind == ("symmetric" if arguments.get("symmetric", True) else "zero-point")
    assert tensor.grid.bits == arguments["num_bits"]
    assert tensor.grid.block == arguments.get("group_size", tensor.shape[1])


def _damaged(folder: Path, drop: str = "", flat: str = "", add: str = "") -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state.pop(drop, None)
    if flat:
        state[flat] = state[flat].reshape(-1)
    if add:
        state[add] = torch.zeros(1)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"drop": f"{MODULE}.weight_packed"}, "is missing"),
        ({"drop": f"{MODULE}.weight_scale"}, "without scales"),
        ({"flat": f"{MODULE}.weight_scale"}, "does not make"),
        ({"flat": f"{MODULE}.weight_packed"}, "does not make"),
        ({"flat": "model.layers.0.mlp.up_proj.weight"}, "where config.json says"),
        ({"add": f"{MODULE}.weight_g_idx"}, "does not make"),
    ],
)
def test_broken_folders(tiny_gemma3: Path, tmp_path: Path, damage: dict[str, str], message: str) -> None:
    _compress(tiny_gemma3, tmp_path / "ct", num_bits=4, strategy="group", group_size=32)
    _damaged(tmp_path / "ct", **damage)
    with pytest.raises(InputError, match=message):
        compressed_tensors.tensors(tmp_path / "ct")


def test_formats_that_are_not_known(tiny_gemma3: Path, tmp_path: Path) -> None:
    _compress(tiny_gemma3, tmp_path / "ct", num_bits=4, strategy="group", group_size=32)
    path = tmp_path / "ct" / "config.json"
    path.write_text(path.read_text().replace("pack-quantized", "marlin-24"))
    with pytest.raises(InputError, match="marlin-24 of compressed-tensors is not known"):
        compressed_tensors.tensors(tmp_path / "ct")
    path.write_text("[]")
    with pytest.raises(InputError, match="is not a JSON object"):
        compressed_tensors.tensors(tmp_path / "ct")
