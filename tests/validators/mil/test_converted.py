"""Modules that coremltools converted from PyTorch, and compressed, run by the evaluator, against PyTorch itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemexport.validators.runtimes.coreml import Program

ct = pytest.importorskip("coremltools")

import coremltools.optimize.coreml as cto  # noqa: E402

# Of tracing, and of coremltools about newer versions than it knows.
pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH, HEADS, LENGTH, VOCABULARY = 64, 4, 7, 50


class Decoder(nn.Module):
    """A decoder layer in the style of GPT-2, with a head that picks the likeliest tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(3)])
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position
        q, k, v = self.qkv(self.norms[0](x)).reshape(1, LENGTH, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.ones(LENGTH, LENGTH).tril().bool()
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(heads.transpose(1, 2).reshape(1, LENGTH, WIDTH))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x)).log_softmax(-1).cumsum(-1)


class Vision(nn.Module):
    """Convolutions, norms and pools, down and up again."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2)
        )
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 16, 2, stride=2), nn.GroupNorm(2, 16), nn.Hardswish())
        self.last = nn.Sequential(
            nn.PixelShuffle(2), nn.InstanceNorm2d(4), nn.AvgPool2d(3, 2, 1), nn.Upsample(scale_factor=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        bilinear = F.interpolate(self.up(self.down(x)), scale_factor=2, mode="bilinear", align_corners=True)
        return self.last(bilinear).flatten(1)


def converted(module: nn.Module, example: Tensor, precision: Any) -> Any:
    """coremltools' conversion of a traced module."""
    module.eval()
    with torch.no_grad():
        traced = torch.jit.trace(module, example, check_trace=False)
    kind = ct.TensorType("x", example.shape, example.numpy().dtype.type)
    return ct.convert(
        traced,
        inputs=[kind],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=precision,
        skip_model_load=True,
    )


def evaluated(model: Any, example: Tensor, path: Path, arithmetic: Any = "f32") -> np.ndarray:
    model.save(str(path))
    (found,) = Program(path, arithmetic).predict({"x": example.numpy()}).values()
    return found


@pytest.mark.parametrize(
    ("make", "shape"), [(Decoder, (1, LENGTH)), (Vision, (1, 3, 16, 16))], ids=["decoder", "vision"]
)
def test_what_coremltools_converts_is_what_pytorch_computes(make: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = make()
    example = torch.randn(shape) if make is Vision else torch.randint(0, VOCABULARY, shape, dtype=torch.int32)
    with torch.no_grad():
        wanted = module.eval()(example).numpy()
    full = evaluated(converted(module, example, ct.precision.FLOAT32), example, tmp_path / "full.mlpackage")
    np.testing.assert_allclose(full, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    half = evaluated(converted(module, example, ct.precision.FLOAT16), example, tmp_path / "half.mlpackage", "f16")
    assert np.abs(half - wanted).max() < 5e-3 * np.abs(wanted).max()
    assert np.abs(half - wanted).max() > 0


@pytest.mark.parametrize("how", ["int4 blocks", "uint8 with zero points", "palette", "pruned"])
def test_what_coremltools_compresses_is_decompressed(how: str, tmp_path: Path) -> None:
    """Against the same package with coremltools' own decompression of its weights."""
    torch.manual_seed(4)
    example = torch.randint(0, VOCABULARY, (1, LENGTH), dtype=torch.int32)
    model = converted(Decoder(), example, ct.precision.FLOAT32)
    if how == "palette":
        config = cto.OptimizationConfig(cto.OpPalettizerConfig(mode="uniform", nbits=4, weight_threshold=64))
        smaller = cto.palettize_weights(model, config)
    elif how == "pruned":
        config = cto.OptimizationConfig(cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=64))
        smaller = cto.prune_weights(model, config)
    else:
        blocks = {"granularity": "per_block", "block_size": 32, "dtype": "int4", "mode": "linear_symmetric"}
        options = blocks if how == "int4 blocks" else {"dtype": "uint8", "mode": "linear"}
        config = cto.OptimizationConfig(cto.OpLinearQuantizerConfig(weight_threshold=64, **options))
        smaller = cto.linear_quantize_weights(model, config)
    assert sum("constexpr" in kind for kind in operations(smaller)) > 4
    whole = cto.decompress_weights(smaller)
    assert not any("constexpr" in kind for kind in operations(whole))
    found = evaluated(smaller, example, tmp_path / "smaller.mlpackage")
    wanted = evaluated(whole, example, tmp_path / "whole.mlpackage")
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def operations(model: Any) -> list[str]:
    function = model.get_spec().mlProgram.functions["main"]
    return [operation.type for operation in function.block_specializations[function.opset].operations]
