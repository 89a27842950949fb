"""Every norm of a graph adds the checkpoint's epsilon, or the verdict names the operator."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemexport.faults.weights import Harmless, Subject
from gemexport.formats.checkpoint import Checkpoint
from gemexport.judge.norms import epsilon_differences
from gemexport.registry import TARGETS

ONE, ALL = "epsilon 1e-5 in one norm", "epsilon 2e-6 in all norms"


@pytest.mark.parametrize(("target", "variant"), [("onnx", "int4"), ("coreml", "int4")])
def test_another_epsilon_is_named(target: str, variant: str, gemma4: Checkpoint, tmp_path: Path) -> None:
    module = pytest.importorskip(f"gemexport.exporters.{target}")
    faults = pytest.importorskip(f"gemexport.faults.{target}").FAULTS
    path = TARGETS[target].path(tmp_path, "model", variant)
    path.parent.mkdir(parents=True)
    module.export(gemma4, path, variant=variant)
    assert epsilon_differences(target, path, gemma4.architecture) == ()
    for name, said, count in ((ONE, "is 1e-05, the checkpoint says 1e-06", 1), (ALL, "is 2e-06", 60)):
        fault = faults[name]
        assert not isinstance(fault, str | Harmless)
        fault(Subject(target, path, gemma4.model))
        found = epsilon_differences(target, path, gemma4.architecture)
        assert len(found) == count
        assert said in str(found[0])
    assert epsilon_differences("mlx", tmp_path, gemma4.architecture) == ()
