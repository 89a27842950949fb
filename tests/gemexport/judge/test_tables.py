"""Tables of angles are compared whole: a wrong row far behind the tokens that were tried is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.faults.stored import writable
from gemexport.formats.checkpoint import Checkpoint
from gemexport.judge.tables import table_differences
from gemexport.registry import TARGETS


def table_of(target: str, path: Path) -> Any:
    """The second table of cosines, to be written to."""
    if target == "coreml":
        from gemexport.formats.coreml import constants
        from gemexport.formats.coreml.package import open_package

        stored: Any = constants(open_package(path))["rope_1_cos"]
        return writable(stored._source.data.view("<f4").reshape(stored.shape))
    from gemexport.formats.onnx import read_model
    from gemexport.formats.onnx.stored import array

    file = path / "prefill.onnx"
    return writable(array(read_model(file).graph.initializers["/rope_1/cos"], file))


@pytest.mark.parametrize(("target", "variant"), [("onnx", "npu"), ("coreml", "int4")])
def test_a_wrong_row_is_named(target: str, variant: str, gemma4: Checkpoint, tmp_path: Path) -> None:
    module = pytest.importorskip(f"gemexport.exporters.{target}")
    path = TARGETS[target].path(tmp_path, "model", variant)
    path.parent.mkdir(parents=True)
    module.export(gemma4, path, variant=variant)
    assert table_differences(target, path, gemma4.architecture) == ()
    table = table_of(target, path)
    last = len(table) - 1
    table[last, 1] += np.float32(1e-5)
    (found,) = table_differences(target, path, gemma4.architecture)
    assert str(found).startswith(f"the cos of RoPE 1 at position {last} is ")
    assert table_differences("gguf", path, gemma4.architecture) == ()


def test_a_table_of_exact_angles_is_as_good(gemma4: Checkpoint, tmp_path: Path) -> None:
    """Its numbers are ours but at large angles, of which there are few: that makes it no broken table of ours."""
    module = pytest.importorskip("gemexport.exporters.onnx")
    path = TARGETS["onnx"].path(tmp_path, "model", "npu")
    path.parent.mkdir(parents=True)
    module.export(gemma4, path, variant="npu")
    table = table_of("onnx", path)
    rope, head_dim = list(dict.fromkeys((layer.rope, layer.head_dim) for layer in gemma4.architecture.layers))[1]
    frequencies = rope.inv_freq(head_dim).astype(np.float32).astype(np.float64)
    exact = np.cos(np.arange(len(table))[:, None] * frequencies).astype(np.float32)
    assert 0 < np.mean(np.abs(exact - table) > 1e-6) < 0.5
    table[:] = exact
    assert table_differences("onnx", path, gemma4.architecture) == ()
    table[1, 1] += np.float32(1e-5)
    assert len(table_differences("onnx", path, gemma4.architecture)) == 1
