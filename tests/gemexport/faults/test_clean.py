"""Artefacts without a fault are not failed: a few here, two hundred by benchmarks/faults.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemexport.faults.clean import fault_free
from gemexport.faults.matrix import COLUMNS


def test_an_artefact_without_a_fault_passes(tmp_path: Path) -> None:
    columns = tuple(column for column in COLUMNS if column[0] in ("onnx", "coreml"))[:2]
    found = list(fault_free(tmp_path, range(1), 60, columns))
    assert [(item.target, item.variant, item.status, item.reason) for item in found] == [
        (target, variant, "pass", "None") for target, variant in columns
    ]


@pytest.mark.slow
def test_no_artefact_over_seeds_and_shapes_is_failed(tmp_path: Path) -> None:
    alarms = [item for item in fault_free(tmp_path, range(1, 5)) if item.status != "pass"]
    assert alarms == []
