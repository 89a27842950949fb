"""Quantized activations in a program, run by the evaluator, against the arithmetic they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.validators.runtimes.coreml import Program

ct = pytest.importorskip("coremltools")

from coremltools.converters.mil.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import types  # noqa: E402

from gemexport.exporters.coreml.quantize import rounded  # noqa: E402


@pytest.mark.parametrize(("kind", "zero_point"), [("int8", 0), ("int8", -3), ("uint8", 0), ("uint8", 131)])
@pytest.mark.parametrize("dtype", [types.fp16, types.fp32])
def test_activations_are_rounded_to_their_codes(kind: Any, zero_point: int, dtype: Any, tmp_path: Path) -> None:
    scale = np.float32(0.037)  # no float16 number

    @mb.program(input_specs=[mb.TensorSpec((3, 40), dtype)], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        return rounded(x, float(scale), "x_rounded", zero_point, kind)

    as_it_is = {"minimum_deployment_target": ct.target.iOS18, "pass_pipeline": ct.PassPipeline.EMPTY}
    ct.convert(program, skip_model_load=True, **as_it_is).save(str(tmp_path / "a.mlpackage"))
    x = np.random.default_rng(1).normal(scale=4, size=(3, 40)).astype(np.float16).astype(np.float32)
    x[0, :3] = [0.5 * scale, 1.5 * scale, 1000]
    x = x.astype(np.float16).astype(np.float32) if dtype is types.fp16 else x
    limits = np.iinfo(kind)
    codes = np.clip(np.rint(x / scale) + zero_point, limits.min, limits.max)
    assert {limits.max, limits.min} & set(codes.ravel())
    for arithmetic in ("f32", "f16"):
        (got,) = Program(tmp_path / "a.mlpackage", arithmetic).predict({"x": x}).values()  # type: ignore[arg-type]
        np.testing.assert_array_equal(got, (codes - zero_point).astype(np.float32) * scale)


def test_no_codes_for_that() -> None:
    with pytest.raises(ValueError, match="no int8 codes have the scale 0"):
        rounded(None, 0, "x")
    with pytest.raises(ValueError, match="the zero point 128"):
        rounded(None, 1, "x", 128)
