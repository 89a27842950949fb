"""Programs with branches, loops and lists, and constants that are read sparse, as coremltools writes them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.formats.storage.errors import InputError
from gemexport.validators.mil.registry import OPERATIONS, Unsupported
from gemexport.validators.runtimes.coreml import Program

ct = pytest.importorskip("coremltools")

from coremltools.converters.mil.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import types  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def saved(program: Any, path: Path, **options: Any) -> Path:
    """A package of an MIL program in float32."""
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
        **options,
    )
    model.save(str(path))
    return path


def test_a_loop_in_a_loop_beside_a_branch(tmp_path: Path) -> None:
    @mb.program(input_specs=[mb.TensorSpec((1,)), mb.TensorSpec((1,))], opset_version=ct.target.iOS18)
    def program(a: Any, b: Any) -> Any:
        def inner(x: Any, n: Any) -> Any:
            return mb.mul(x=x, y=b), mb.add(x=n, y=np.int32(1))

        def outer(x: Any, n: Any) -> Any:
            y, _ = mb.while_loop(
                _cond=lambda x, k: mb.less(x=k, y=np.int32(2)), _body=inner, loop_vars=(x, np.int32(0))
            )
            return y, mb.add(x=n, y=np.int32(1))

        x, n = mb.while_loop(_cond=lambda x, n: mb.less(x=n, y=np.int32(3)), _body=outer, loop_vars=(a, np.int32(0)))
        small = mb.less(x=mb.squeeze(x=a, axes=[0]), y=np.float32(2))
        branch = mb.cond(pred=small, _true_fn=lambda: mb.add(x=x, y=b), _false_fn=lambda: mb.identity(x=x))
        return branch, n

    program_of_it = Program(saved(program, tmp_path / "a.mlpackage"))
    for a, b in ((1.0, 3.0), (2.0, 0.5)):
        got = program_of_it.predict({"a": np.float32([a]), "b": np.float32([b])})
        assert [value.tolist() for value in got.values()] == [[a * b**6 + (b if a < 2 else 0)], [3]]


def test_a_loop_that_fills_a_list(tmp_path: Path) -> None:
    @mb.program(input_specs=[mb.TensorSpec((2,))], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        def body(n: Any, ls: Any) -> Any:
            value = mb.mul(x=x, y=mb.cast(x=n, dtype="fp32"))
            return mb.add(x=n, y=np.int32(1)), mb.list_write(ls=ls, index=n, value=value)

        empty = mb.make_list(init_length=1, elem_shape=(2,))
        _, ls = mb.while_loop(
            _cond=lambda n, ls: mb.less(x=n, y=np.int32(4)), _body=body, loop_vars=(np.int32(0), empty)
        )
        ls = mb.list_scatter(ls=ls, indices=[1], value=np.float32([[7, 8]]))
        return mb.list_gather(ls=ls, indices=[3, 1]), mb.list_length(ls=ls), mb.list_read(ls=ls, index=2)

    got = Program(saved(program, tmp_path / "a.mlpackage")).predict({"x": np.float32([1, 10])})
    rows, length, third = (value.tolist() for value in got.values())
    assert rows == [[3, 30], [7, 8]]
    assert length == [4]  # Core ML gives no scalars
    assert third == [2, 20]


def test_lists_are_not_read_where_nothing_is() -> None:
    fixed = OPERATIONS["make_list"](elem_shape=[2], init_length=1, dynamic_length=False)
    with pytest.raises(Unsupported, match="no element 1 in a list of 1"):
        OPERATIONS["list_write"](ls=fixed, index=1, value=None)
    unknown = OPERATIONS["make_list"](elem_shape=["size"], init_length=1)
    with pytest.raises(Unsupported, match="never written"):
        OPERATIONS["list_read"](ls=unknown, index=0)


@pytest.mark.parametrize("kind", ["palette", "vectors", "scaled"])
def test_the_elements_of_a_sparse_constant_read_directly(kind: str, tmp_path: Path) -> None:
    """The example of coremltools' documentation (iOS18/compression.py), and what its other operation says."""
    mask = np.array([[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1], [0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]])
    mask, codes = mask.astype(types.np_uint1_dtype), np.array([0, 1, 1, 0, 1, 1, 0, 0, 1])
    wanted = {"palette": codes + 2, "scaled": (codes - 1) * 2}.get(kind)

    @mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        if kind == "scaled":
            _, values = mb.constexpr_sparse_blockwise_shift_scale(
                data_mask=mask,
                nonzero_data=codes.astype(np.int8),
                scale=np.array([[2.0]], np.float32),
                offset=np.array([[1]], np.int8),
            )
        else:
            lut = [[2.0, 2.0], [3.0, 3.0]] if kind == "vectors" else [[2.0], [3.0]]
            _, values = mb.constexpr_lut_to_sparse(
                indices_mask=mask,
                indices_nonzero_data=codes.astype(types.np_uint1_dtype),
                lut=np.array(lut, np.float32).reshape(1, 1, 2, -1),
                vector_axis=0 if kind == "vectors" else None,
            )
        return mb.add(x=x, y=values)

    path = saved(program, tmp_path / "a.mlpackage", pass_pipeline=ct.PassPipeline.EMPTY)
    (got,) = Program(path).predict({"x": np.float32([0])}).values()
    if wanted is None:  # each row of the mask twice, and so its elements
        counts = np.cumsum([0, *(mask != 0).sum(1)])
        rows = [codes[start:stop] + 2 for start, stop in itertools.pairwise(counts)]
        wanted = np.concatenate([row for row in rows for _ in range(2)])
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("kind", ["normal", "uniform", "bernoulli", "categorical"])
def test_random_numbers_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    @mb.program(input_specs=[mb.TensorSpec((1, 2))], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        given = {"x": x} if kind == "categorical" else {"shape": np.array([1, 2], np.int32)}
        return mb.add(x=x, y=mb.cast(x=getattr(mb, f"random_{kind}")(**given), dtype="fp32"))

    with pytest.raises(InputError, match=f"random_{kind} draws numbers of its own"):
        Program(saved(program, tmp_path / "a.mlpackage"))
