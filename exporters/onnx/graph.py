"""What both ONNX exports build on: a graph under construction, and the file that its weights stream into.

Weights are planned first, as initializers that name a place in one external file, and written last: each tensor is
read once, a slice of rows at a time, however many layouts of it the graphs hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gemexport.exporters.result import Progress
from gemexport.formats.tensor import ITEM_BYTES, DType, Rows, Tensor, matrix_of, to_bf16

PRODUCER = "gemexport"
OPSET, IR_VERSION = 23, 11  # the first with RMSNormalization; blocked DequantizeLinear came with 21
TWO_BIT_OPSET, TWO_BIT_IR_VERSION = 25, 13  # the first with INT2 and UINT2
TWO_BIT = (ir.DataType.INT2, ir.DataType.UINT2)
FLOATS: dict[DType, ir.DataType] = {
    "bf16": ir.DataType.BFLOAT16,
    "f16": ir.DataType.FLOAT16,
    "f32": ir.DataType.FLOAT,
}
# Windows maps files at multiples of 64 KiB; small tensors are read, not mapped, and only want alignment.
SLICE_BYTES = 16 << 20  # of the source, as float32
MAPPED_BYTES, MAPPED_ALIGNMENT, ALIGNMENT = 1 << 20, 1 << 16, 1 << 6

Convert = Callable[[Rows], NDArray[Any]]


def stored_floats(values: NDArray[np.float32], dtype: DType) -> NDArray[Any]:
    """Float32 values as `dtype` stores them; bf16 as bit patterns."""
    return to_bf16(values) if dtype == "bf16" else values.astype(np.float16 if dtype == "f16" else np.float32)


@dataclass(frozen=True)
class Slot:
    """A place in the file of external data, and what fills it: an array, or a tensor's rows in some layout."""

    initializer: ir.ExternalTensor
    columns: int  # rows of the tensor become columns of so many arrays, one below the other; 0: they stay rows
    fill: NDArray[Any] | Convert


class Weights:
    """The external data of one or more graphs: planned first, then written in one pass over the source."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.sizes: dict[str, int] = {}  # bytes by file name
        self.written = False
        self._slots: dict[str, list[Slot]] = {}  # by the tensor they come from
        self._planned: dict[tuple[str, str], ir.ExternalTensor] = {}

    def plan(
        self,
        tensor: str,
        layout: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        fill: NDArray[Any] | Convert,
        *,
        file: str,
        columns: int = 0,
    ) -> ir.ExternalTensor:
        """A place in `file` for `tensor` in `layout`; the same place again when it was planned before.

        Rows of the tensor are rows of what lies there, or columns: all of them of one array, or of each of so many
        matrices that the tensor is a stack of (`columns`), whose arrays lie one below the other.
        """
        known = self._planned.get((tensor, layout))
        if known is not None:
            return known
        if self.written:
            raise ValueError(f"{tensor} was not planned before the weights were written")
        nbytes = -(-int(np.prod(shape, dtype=np.int64)) * dtype.bitwidth // 8)
        alignment = MAPPED_ALIGNMENT if nbytes >= MAPPED_BYTES else ALIGNMENT
        offset = -(-self.sizes.get(file, 0) // alignment) * alignment
        self.sizes[file] = offset + nbytes
        stored = ir.ExternalTensor(file, offset, nbytes, dtype, shape=ir.Shape(shape), name=tensor)
        self._planned[tensor, layout] = stored
        self._slots.setdefault(tensor, []).append(Slot(stored, columns, fill))
        return stored

    def write(self, folder: Path, progress: Progress) -> None:
        """Write the files; holds a slice of rows. Raises OSError when the disk is full."""
        data = {}
        for name, size in self.sizes.items():
            with (folder / name).open("wb") as file:
                _reserve(file.fileno(), size)
            data[name] = np.memmap(folder / name, np.uint8, "r+", shape=(size,))
        for tensor, slots in self._slots.items():
            self._write_tensor(data, tensor, slots, progress)
        for whole in data.values():
            whole.flush()
        self.written = True

    def _write_tensor(
        self, data: Mapping[str, NDArray[np.uint8]], name: str, slots: list[Slot], progress: Progress
    ) -> None:
        targets = []
        for slot in slots:
            start, length = int(slot.initializer.offset or 0), int(slot.initializer.length or 0)
            target = data[str(slot.initializer.location)][start : start + length]
            if isinstance(slot.fill, np.ndarray):
                target[:] = np.ascontiguousarray(slot.fill).reshape(-1).view(np.uint8)
            else:
                targets.append((target, slot.columns, slot.fill))
        if not targets:
            return
        tensor = self.tensors[name]
        out, width = matrix_of(tensor.shape)
        # Whole bytes of columns, also with four codes a byte.
        step = max(SLICE_BYTES // (4 * width) // 8 * 8, 8)
        for start in range(0, out, step):
            stop = min(start + step, out)
            rows = tensor.rows(start, stop)
            for target, columns, convert in targets:
                _place(target, convert(rows), columns, start, stop, out)
            progress((stop - start) * width * ITEM_BYTES[tensor.dtype])


def _place(target: NDArray[np.uint8], part: NDArray[Any], columns: int, start: int, stop: int, total: int) -> None:
    """Put converted rows `start` to `stop` of `total` where they belong in the bytes of the whole."""
    part = np.ascontiguousarray(part)
    if not columns:
        each = part.nbytes // (stop - start)
        target[start * each : stop * each] = part.reshape(-1).view(np.uint8)
        return
    whole = target.view(part.dtype).reshape(columns, part.shape[0], -1)
    each, width, first = total // columns, whole.shape[2], start
    while first < stop:
        matrix, row = divmod(first, each)
        last = min(stop, first - row + each)
        # With several codes a byte, a slice of `out` is fewer columns than it has rows.
        taken = part[:, (first - start) * width // each : (last - start) * width // each]
        whole[matrix, :, row * width // each : (row + last - first) * width // each] = taken
        first = last


def _reserve(file: int, size: int) -> None:
    """Give a file its size and its blocks, so that a full disk is an error here and not a fault in a mapping."""
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    zeros = bytes(1 << 20)
    for start in range(0, size, len(zeros)):
        os.write(file, zeros[: min(len(zeros), size - start)])


class GraphBuilder:
    """A graph under construction: operators in order, constants and weights as initializers, all with steady names."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self._counts: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], int] = {}

    def op(self, kind: str, inputs: Iterable[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        """The output of an operator that has one."""
        return self.ops(kind, 1, inputs, domain, **attributes)[0]

    def ops(
        self, kind: str, outputs: int, inputs: Iterable[ir.Value | None], domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """The outputs of an operator that has several."""
        number = self._counts[kind] = self._counts.get(kind, -1) + 1
        name = f"/{kind}_{number}"
        values = [ir.Value(name=f"{name}/output_{i}") for i in range(outputs)]
        self.nodes.append(ir.node(kind, list(inputs), attributes, domain=domain, outputs=values, name=name))
        return values

    def repeat(self, times: ir.Value, start: ir.Value, body: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """`start`, of f32, after `body` was applied `times` times: to the number of the turn and what was so far.

        Constants and weights of the body are those of the graph around it.
        """
        outer, self.nodes = self.nodes, []
        number = self._counts["Loop"] = self._counts.get("Loop", -1) + 1
        name = f"/Loop_{number}"
        turn, going, before = (ir.Value(name=f"{name}/{part}") for part in ("turn", "going", "before"))
        after = body(turn, before)
        further = self.op("Identity", [going])
        turn.type, turn.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(())
        for value in (going, further):
            value.type, value.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape(())
        before.type = after.type = ir.TensorType(ir.DataType.FLOAT)
        inner = ir.Graph([turn, going, before], [further, after], nodes=self.nodes, name=f"{name}/body")
        self.nodes = outer
        value = ir.Value(name=f"{name}/output_0")
        self.nodes.append(ir.node("Loop", [times, None, start], {"body": inner}, outputs=[value], name=name))
        return value

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """An input of the graph."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make a value an output of the graph."""
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        self.outputs.append(value)

    def constant(self, value: Any, dtype: Any) -> ir.Value:
        """A constant inside the graph; one initializer for equal ones."""
        array = np.asarray(value, dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        number = self._constants.setdefault(key, len(self._constants))
        name = f"/constants/{number}"
        return self.initializer(name, ir.Tensor(array, name=name))

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A named initializer; the one of that name when there is one."""
        if name not in self.initializers:
            self.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.initializers[name]

    def external(
        self,
        name: str,
        stored: ir.ExternalTensor,
        shape: Sequence[int] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ir.Value:
        """An initializer whose data lie at a planned place, in another shape if one is given."""
        place = ir.ExternalTensor(
            stored.location,
            stored.offset,
            stored.length,
            stored.dtype,
            shape=ir.Shape(stored.shape.numpy() if shape is None else shape),
            name=name,
            metadata_props=dict(metadata or {}),
        )
        return self.initializer(name, place)

    def save(self, path: Path, producer: str) -> None:
        """Write the graph, without its external data."""
        ir.save(self._model(producer), path)

    def nbytes(self, producer: str) -> int:
        """Bytes of what `save` writes."""
        return int(ir.to_proto(self._model(producer)).ByteSize())

    def _model(self, producer: str) -> ir.Model:
        """The model, for the oldest opset that has all of it."""
        two_bit = any(value.dtype in TWO_BIT for value in self.initializers.values())
        opset, version = (TWO_BIT_OPSET, TWO_BIT_IR_VERSION) if two_bit else (OPSET, IR_VERSION)
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": opset, **{node.domain: 1 for node in self.nodes if node.domain}},
            name=self.name,
        )
        return ir.Model(graph, ir_version=version, producer_name=producer)
