"""A mask that leaves tokens a share is named, whatever logits show; a right one is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from gemexport.faults.weights import Subject
from gemexport.formats.checkpoint import Checkpoint
from gemexport.judge.masks import mask_differences

onnx = pytest.importorskip("gemexport.exporters.onnx")


@pytest.mark.parametrize("variant", ["npu", "int4"])
def test_what_a_right_graph_adds_hides(variant: str, gemma4: Checkpoint, tmp_path: Path) -> None:
    sizes = {"context": 64, "prefill": 8} if variant == "npu" else {}
    path = onnx.export(gemma4, tmp_path / variant, variant=variant, **sizes).path
    assert mask_differences("onnx", path) == ()
    if variant == "int4":  # ONNX Runtime's operator masks
        return
    from gemexport.faults.onnx import FAULTS

    broken = Path(shutil.copytree(path, tmp_path / "broken"))
    make = FAULTS["mask -20 for -inf"]
    assert callable(make)
    make(Subject("onnx", broken, gemma4.model))
    found = [str(fact) for fact in mask_differences("onnx", broken)]
    assert found
    assert all(line.endswith("is -20, the checkpoint says -10000 or less") for line in found)
    assert {line.partition(": ")[0] for line in found} == {"what prefill.onnx", "what decode.onnx"}


def test_a_key_that_is_counted_elsewhere_is_named(gemma4: Checkpoint, tmp_path: Path) -> None:
    """No text of a validation is as long as a cache: its farthest keys are behind every mask that is tried."""
    import onnx_ir as ir

    path = onnx.export(gemma4, tmp_path / "npu", variant="npu", context=64, prefill=8).path
    model = ir.load(path / "decode.onnx")
    row = next(value for value in model.graph.initializers.values() if value.shape == ir.Shape((1, 65)))
    assert row.const_value is not None
    positions = np.array(row.const_value.numpy())
    positions[0, 3] ^= 0x46
    row.const_value = ir.Tensor(positions, name=row.name)
    ir.save(model, path / "decode.onnx")
    (found,) = mask_differences("onnx", path)
    assert "decode.onnx" in str(found)
    assert str(found).endswith("the checkpoint says 1")


def test_other_formats_have_masks_of_their_own(tmp_path: Path) -> None:
    assert mask_differences("gguf", tmp_path) == ()
