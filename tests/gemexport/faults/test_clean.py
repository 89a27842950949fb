"""Artefacts without a fault are not failed: a few here, four hundred by benchmarks/faults.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemexport.faults.clean import KINDS, NOISE, fault_free
from gemexport.faults.matrix import COLUMNS


@pytest.mark.slow
def test_an_artefact_without_a_fault_passes(tmp_path: Path) -> None:
    columns = tuple(column for column in COLUMNS if column[0] in ("onnx", "coreml"))[:2]
    found = list(fault_free(tmp_path, range(1), 60, columns))
    assert [(item.target, item.variant, item.alarms) for item in found] == [(*column, ()) for column in columns]
    for item in found:
        assert item.noise is not None
        assert NOISE[0] <= item.noise <= NOISE[1]


def test_weights_of_every_kind_are_what_was_promised(tmp_path: Path) -> None:
    found = list(fault_free(tmp_path, range(1, 5), 60, COLUMNS[:2], run_every=8))
    assert {item.model.kind for item in found} == set(KINDS)
    assert [item.alarms for item in found] == [()] * len(found)
    assert all(item.noise is None for item in found)


@pytest.mark.slow
def test_no_artefact_over_seeds_and_shapes_is_failed(tmp_path: Path) -> None:
    alarms = [item for item in fault_free(tmp_path, range(1, 5)) if item.alarms]
    assert alarms == []
