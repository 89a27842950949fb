"""A small Gemma 4 in the mobile format through all five formats: the same codes, the same logits, and faults that show.

The model is made of transformers' own quantized layers with E2B's quantization, and judged by transformers itself.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import gemexport
from gemexport.demo import mobile as demo_mobile
from gemexport.exporters import compressed_tensors, onnx
from gemexport.formats.activations import Activations, LinearActivations, Quantizer
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.grids.recipe import load_recipe
from gemexport.formats.grids.search import find_grids
from gemexport.formats.tensor import Floats, Tensor
from gemexport.registry import TARGETS
from gemexport.shared.place import Place
from gemexport.validators.checks.divergence import Divergence
from gemexport.validators.reference import reference
from gemexport.validators.reference.decoder import quiet
from gemexport.validators.runtimes.onnxruntime import load

TOKENS, CONTEXT, PREFILL = 256, 256, 64
TOP1, KLD = 0.99, 1e-3
HEAD, INNER = "lm_head.weight", "model.layers.3.mlp.up_proj.weight"
# PyTorch with its sums in another order is at 2.2e-4, and at 99.8 %; what the rounding itself costs is 3.0e-4.

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Mobile:
    """The checkpoint, opened, and what it is judged on."""

    checkpoint: Checkpoint
    sequences: list[list[int]]

    def reference(self, activations: Activations | None) -> list[Floats]:
        """Logits of the reference with these static scales."""
        model = reference(self.checkpoint.text_config, dict(self.checkpoint.tensors), 1, activations=activations)
        return [model.logits(sequence) for sequence in self.sequences]

    def divergence(self, p: list[Floats], q: list[Floats]) -> Divergence:
        """How far `q` is from `p`."""
        total = Divergence()
        for tokens, expected, found in zip(self.sequences, p, q, strict=True):
            total.add(expected, found, tokens)
        return total


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Mobile:
    folder = tmp_path_factory.mktemp("mobile")
    place = Place(demo_mobile.make(folder / "model"), folder / "work", TOKENS)
    checkpoint = place.checkpoint()
    find_grids(checkpoint, place.grids, load_recipe("lossless"))
    checkpoint = place.open()
    return Mobile(checkpoint, place.sequences(checkpoint))


@pytest.fixture(scope="module")
def expected(mobile: Mobile) -> list[Floats]:
    """Logits by transformers in float32, which reads the checkpoint itself and leaves caches in floating point."""
    with quiet():
        model: Any = transformers.Gemma4ForConditionalGeneration.from_pretrained(
            mobile.checkpoint.path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    found = []
    for sequence in mobile.sequences:
        with torch.inference_mode():
            found.append(model(torch.tensor([sequence]), use_cache=False).logits[0].numpy())
    return found


def same_codes(wanted: Tensor, stored: Tensor) -> bool:
    """Whether two matrices have the same codes, read as signed ones."""
    found = stored.rows(0, stored.shape[0]).codes
    codes = wanted.rows(0, wanted.shape[0]).codes
    return found is not None and codes is not None and found.dtype == codes.dtype and np.array_equal(found, codes)


FORMATS = [
    ("gguf", "Q4_0", {}),
    ("mlx", "4bit", {}),
    ("onnx", "int4", {}),
    ("onnx", "npu", {"context": CONTEXT, "prefill": PREFILL}),
    ("coreml", "int4", {}),
    ("compressed-tensors", "w4a16", {}),
]


@pytest.mark.parametrize(("target", "variant", "options"), FORMATS)
def test_every_format_has_the_codes(
    target: str, variant: str, options: dict[str, Any], mobile: Mobile, tmp_path: Path
) -> None:
    format, place = TARGETS[target], TARGETS[target].path(tmp_path, "mobile", variant)
    path = format.exporter().export(mobile.checkpoint, place, variant=variant, **options).path
    stored: Mapping[str, Tensor] = format.reader().tensors(path)
    widths = set()
    for name, tensor in mobile.checkpoint.tensors.items():
        values, found = tensor.numpy(), stored[name].numpy()
        if tensor.grid is None:
            np.testing.assert_array_equal(found, values, err_msg=name)
            continue
        widths.add(tensor.grid.bits)
        assert same_codes(tensor, stored[name]), f"{name} has other codes"
        # GGUF's scales are f16: half a step of 11 bits.
        np.testing.assert_allclose(found, values, rtol=2.0**-11 if target == "gguf" else 0.0, atol=0, err_msg=name)
    assert widths == {2, 4, 8}


# As users load it, with nothing of ours: every embedding and linear, and the first next token.
PROGRAM = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", attn_implementation="eager")
logits = model(torch.tensor([[int(token) for token in sys.argv[3:]]]), use_cache=False).logits[0]
assert model.dtype == torch.float32
assert not any(name.startswith("gemexport") for name in sys.modules)
names = [name for name, value in model.state_dict().items() if value.ndim == 2 and name.endswith(".weight")]
numpy.savez(sys.argv[2], logits=logits.detach().numpy(), **{name: model.get_parameter(name).detach() for name in names})
"""


def test_compressed_tensors_loads_with_its_codes(mobile: Mobile, expected: list[Floats], tmp_path: Path) -> None:
    """transformers itself, on a folder whose embeddings are codes too: the source's weights, and its logits."""
    folder = compressed_tensors.export(mobile.checkpoint, tmp_path / "ct").path
    tokens = [str(token) for token in mobile.sequences[0]]
    command = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "found.npz"), *tokens]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Could not match" not in done.stderr
    found = np.load(tmp_path / "found.npz")
    matrices = {name: tensor for name, tensor in mobile.checkpoint.tensors.items() if len(tensor.shape) == 2}
    for name, tensor in matrices.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
    total = Divergence()
    total.add(expected[0], found["logits"], mobile.sequences[0])
    assert total.kld_mean == 0.0


def test_compressed_tensors_passes_its_validator(mobile: Mobile, tmp_path: Path) -> None:
    report = gemexport.export(mobile.checkpoint.path, tmp_path / "out", formats=["compressed-tensors"], tokens=128)
    artifact = report.artifacts[0]
    assert artifact.status == "pass", artifact.reason
    assert artifact.weights is not None
    assert artifact.weights.exact_fraction == 1.0
    assert artifact.logits is not None
    assert artifact.logits.conversion is not None
    assert artifact.logits.conversion.kld_mean < 1e-9


def run(mobile: Mobile, activations: Activations, folder: Path, placed: onnx.Placing) -> list[Floats]:
    """Logits of the ONNX graphs for an NPU with static scales, on ONNX Runtime's CPU provider."""
    checkpoint = replace(mobile.checkpoint, activations=activations)
    path = onnx.export(checkpoint, folder, variant="npu", context=CONTEXT, prefill=PREFILL, activations=placed).path
    model = load(path, threads=1, context=TOKENS)
    found = [model.logits(sequence) for sequence in mobile.sequences]
    model.close()
    return found


def test_onnx_with_activations_is_the_model(mobile: Mobile, expected: list[Floats], tmp_path: Path) -> None:
    assert mobile.checkpoint.activations is not None
    found = mobile.divergence(expected, run(mobile, mobile.checkpoint.activations, tmp_path / "npu", "linears"))
    assert found.positions >= TOKENS
    assert found.top1_agreement >= TOP1
    assert found.kld_mean <= KLD


def test_onnx_with_integer_caches_is_the_model(mobile: Mobile, tmp_path: Path) -> None:
    activations = mobile.checkpoint.activations
    assert activations is not None
    assert activations.caches
    found = mobile.divergence(mobile.reference(activations), run(mobile, activations, tmp_path / "npu", "all"))
    assert found.top1_agreement >= TOP1
    assert found.kld_mean <= KLD


def changed(activations: Activations, weight: str, quantizer: Quantizer) -> Activations:
    """The same scales but for the input of one linear."""
    both = replace(activations.linears[weight], input=quantizer)
    return replace(activations, linears={**activations.linears, weight: both})


def every(activations: Activations, factor: float) -> Activations:
    """All scales of linears times a factor."""

    def other(quantizer: Quantizer | None) -> Quantizer | None:
        return quantizer and replace(quantizer, scale=quantizer.scale * factor)

    return Activations({w: LinearActivations(other(b.input), other(b.output)) for w, b in activations.linears.items()})


# Measured: 1.25e-3, 2.4e-2, 1.3e-3, 1.4, 2.5, 1.2e-2.
@pytest.mark.parametrize(
    "fault", ["all doubled", "all halved", "zero point", "zero point of the head", "head / 8", "head * 16"]
)
def test_wrong_scales_show_in_the_logits(fault: str, mobile: Mobile, expected: list[Floats]) -> None:
    assert mobile.checkpoint.activations is not None
    given = mobile.checkpoint.activations.without_caches()
    head, inner = given.linears[HEAD].input, given.linears[INNER].input
    assert head is not None
    assert inner is not None
    wrong = {
        "all doubled": lambda: every(given, 2),
        "all halved": lambda: every(given, 0.5),
        "zero point": lambda: changed(given, INNER, replace(inner, zero_point=128)),  # as if it were unsigned
        "zero point of the head": lambda: changed(given, HEAD, replace(head, zero_point=128)),
        "head / 8": lambda: changed(given, HEAD, replace(head, scale=head.scale / 8)),
        "head * 16": lambda: changed(given, HEAD, replace(head, scale=head.scale * 16)),
    }[fault]()
    assert mobile.divergence(expected, mobile.reference(wrong)).kld_mean > KLD


def test_one_doubled_scale_shows_in_what_is_read_back(mobile: Mobile, expected: list[Floats], tmp_path: Path) -> None:
    """One doubled scale of 314 adds no more noise than the order of the sums does (2.7e-4), so scales are compared."""
    given = mobile.checkpoint.activations
    assert given is not None
    right = given.linears[INNER].input
    assert right is not None
    wrong = changed(given, INNER, replace(right, scale=right.scale * 2))
    assert mobile.divergence(expected, mobile.reference(wrong.without_caches())).kld_mean < KLD
    for activations, differing in ((given, []), (wrong, [f"{INNER}, input"])):
        checkpoint = replace(mobile.checkpoint, activations=activations)
        path = onnx.export(checkpoint, tmp_path / str(len(differing)), variant="npu", context=64, prefill=8).path
        assert list(given.differences(TARGETS["onnx"].activations(path))) == differing
