"""Checkpoints with more bits than a plain variant has room for, end to end: each weight is rounded once, and judged so.

A checkpoint in float32, and a LoRA merged into one in bf16: the matrices that it changes are float32, others are not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gemexport
from gemexport import demo
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.storage.safetensors import Entry, ShardedWriter
from gemexport.formats.tensor import DType, round_to
from gemexport.registry import TARGETS

TOKENS = 64
# Half a unit in the last of 8 or 11 bits, of a number that has no more than the first.
ROUNDING: dict[DType, float] = {"bf16": 2.0**-8, "f16": 2.0**-11}


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 whose weights are no 16-bit numbers."""
    folder = tmp_path_factory.mktemp("float32") / "model"
    demo.make(folder, family="gemma3", size="tiny", rule=None)
    tensors, stream = open_checkpoint(folder).tensors, np.random.default_rng(1)
    values = {
        name: tensor.numpy() * (1 + stream.uniform(-(2.0**-9), 2.0**-9, tensor.shape)).astype(np.float32)
        for name, tensor in tensors.items()
    }
    (folder / "model.safetensors").unlink()
    with ShardedWriter(folder, [Entry(name, "F32", array.shape) for name, array in values.items()]) as out:
        for name, array in values.items():
            out.write(name, array)
    return folder


PLAIN = {"gguf": "BF16", "mlx": "bf16", "coreml": "f16", "compressed-tensors": "bf16"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("merged", "formats"), [(False, ("mlx", "coreml")), (True, ("gguf", "compressed-tensors"))], ids=["float32", "lora"]
)
def test_wider_weights_are_rounded_once(
    merged: bool,
    formats: tuple[str, ...],
    float32: Path,
    golden: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    model: Path = request.getfixturevalue("tiny_gemma3") if merged else float32
    adapter = golden / "lora" if merged else None
    variants = {name: (PLAIN[name],) for name in formats}
    report = gemexport.export(
        model, tmp_path / "out", formats=list(formats), variants=variants, adapter=adapter, tokens=TOKENS
    )
    source = open_checkpoint(model, adapter=adapter)
    wider = {name for name, tensor in source.tensors.items() if tensor.dtype == "f32" and len(tensor.shape) == 2}
    assert wider
    for artifact in report.artifacts:
        target = TARGETS[artifact.format]
        dtype = target.plain(artifact.variant)
        assert dtype is not None
        assert (artifact.status, artifact.reason) == ("pass", None)
        assert artifact.weights is not None
        changed = {item.name for item in artifact.weights.tensors if item.exact < item.compared}
        assert changed & {name for name, tensor in source.tensors.items() if len(tensor.shape) == 2} == wider
        errors = {item.name: item.max_relative_error for item in artifact.weights.tensors}
        assert 0 < max(errors[name] for name in wider) <= ROUNDING[dtype]
        assert artifact.notes, "that weights were rounded is said"
        stored = target.reader().tensors(tmp_path / "out" / artifact.path)
        for name in wider:
            np.testing.assert_array_equal(stored[name].numpy(), round_to(source.tensors[name].numpy(), dtype))
