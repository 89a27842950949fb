"""What a graph computes is read back by layer: right ones say nothing, a fault of one operator is named exactly."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from gemexport.faults.weights import Harmless, Subject
from gemexport.formats.checkpoint import Checkpoint
from gemexport.judge.structure import judged_structure
from gemexport.registry import TARGETS

SIZES = {"context": 64, "prefill": 8}
VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("onnx", "int4", {}),
    ("onnx", "npu", SIZES),
    ("onnx", "npu-a8", {**SIZES, "calibration": [list(range(3, 40))]}),
    ("onnx", "npu-a16", {**SIZES, "calibration": [list(range(3, 40))]}),
    ("coreml", "int4", {"context": 64}),
    ("coreml", "f32", {"context": 64}),
)
IDS = [f"{target} {variant}" for target, variant, _ in VARIANTS]
FAULTS = {
    "erf for tanh in one GELU": r"what follows gate_proj is GELU by erf in layers 0, the checkpoint says GELU in",
    "attention soft cap 50 in one layer": r"the attention softcap is (50|50\.0\d*) in layers 0, the checkpoint says no",
    "attention scale 0.2 % larger in one layer": r"the attention scale is 1\.00[12]\d* in layers 0, the checkpoint",
    "epsilon 1e-5 in one norm": r"the epsilon of \S+ is 1e-05( in layers \d)?, the checkpoint says 1e-06",
    "epsilon 2e-6 in all norms": r"the epsilon of \S+ is 2e-06( in layers \d.*)?, the checkpoint says 1e-06",
    "soft cap lost": r"the soft cap of logits is none, the checkpoint says 30",
}


def exported(checkpoint: Checkpoint, folder: Path, target: str, variant: str, options: dict[str, Any]) -> Path:
    """The artefact of a checkpoint."""
    module = pytest.importorskip(f"gemexport.exporters.{target}")
    path = TARGETS[target].path(folder, "model", variant)
    path.parent.mkdir(parents=True, exist_ok=True)
    module.export(checkpoint, path, variant=variant, **options)
    return path


@pytest.mark.parametrize(("target", "variant", "options"), VARIANTS, ids=IDS)
def test_a_fault_of_one_operator_is_named_with_its_layer(
    target: str, variant: str, options: dict[str, Any], gemma4: Checkpoint, tmp_path: Path
) -> None:
    path = exported(gemma4, tmp_path / "own", target, variant, options)
    assert judged_structure(target, path, gemma4.architecture) == ((), ())
    faults = pytest.importorskip(f"gemexport.faults.{target}").FAULTS
    for name, said in FAULTS.items():
        make = faults[name]
        if isinstance(make, str):
            continue  # Core ML's operation for attention has no cap
        assert not isinstance(make, Harmless)
        broken = Path(shutil.copytree(path, tmp_path / "broken" / path.name))
        make(Subject(target, broken, gemma4.model))
        found, notes = judged_structure(target, broken, gemma4.architecture)
        assert found
        assert all(re.search(said, str(item)) for item in found), (name, found)
        assert notes == ()
        shutil.rmtree(tmp_path / "broken")


def test_formats_without_a_graph_have_no_structure(gemma4: Checkpoint, tmp_path: Path) -> None:
    assert judged_structure("gguf", tmp_path, gemma4.architecture) == ((), ())
