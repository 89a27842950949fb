"""Initializers of an ONNX graph: where their bytes lie, and what their elements are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.onnx.blocks import to_floats
from gemexport.formats.onnx.form import BROKEN
from gemexport.formats.onnx.walk import constant
from gemexport.formats.storage.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

FLOATS = {"FLOAT": "<f4", "FLOAT16": "<f2", "BFLOAT16": "<u2"}  # bf16 as its bit patterns
NUMPY_DTYPES = {**FLOATS, "UINT8": "u1", "INT8": "i1", "UINT16": "<u2", "INT16": "<i2", "INT32": "<i4"}
SUB_BYTE = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT4E2M1": 4}
INTEGERS = {"INT2": 2, "INT4": 4, "INT8": 8, "INT16": 16, "INT32": 32, "UINT2": 2, "UINT4": 4, "UINT8": 8, "UINT16": 16}
NO_NUMBERS = frozenset(("STRING", "UNDEFINED"))
SMALL_FLOATS = frozenset(("FLOAT4E2M1", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"))


def array(value: ir.Value, file: Path) -> NDArray[Any]:
    """An initializer as it is stored: mapped if external; bf16 as uint16, sub-byte types as their bytes."""
    kind, shape = described(value, file)
    sizes = list(shape)
    if kind in SUB_BYTE:
        if not sizes or sizes[-1] * SUB_BYTE[kind] % 8:
            raise InputError(file, f"the rows of {value.name} do not fill whole bytes", "export it as 8 bit")
        sizes[-1] = sizes[-1] * SUB_BYTE[kind] // 8
    dtype = np.dtype("u1" if kind in SUB_BYTE else NUMPY_DTYPES.get(kind, "V1"))
    return raw(value, file).view(dtype).reshape(sizes)


def needed(node: ir.Node, index: int, file: Path) -> ir.Value:
    """The initializer behind an input of an operator, through casts; InputError where there is none."""
    value = constant(node.inputs[index]) if len(node.inputs) > index else None
    if value is None or value.const_value is None:
        raise InputError(file, f"input {index} of {node.op_type} {node.name} is no initializer", BROKEN)
    return value


def described(value: ir.Value, file: Path) -> tuple[str, tuple[int, ...]]:
    """The element type, by ONNX's name, and the shape of an initializer; InputError for what is none."""
    if value.const_value is None or value.dtype is None or value.shape is None:
        raise InputError(file, f"{value.name} is no initializer", BROKEN)
    stored, kind = value.const_value, value.dtype.name
    sizes = tuple(int(size) for size in stored.shape.numpy())
    if kind in NO_NUMBERS or stored.dtype != value.dtype or stored.shape != value.shape or min(sizes, default=0) < 0:
        problem = f"{value.name} is {kind} {value.shape}, and stored as {stored.dtype} {stored.shape}"
        raise InputError(file, problem, BROKEN)
    return kind, sizes


def raw(value: ir.Value, file: Path) -> NDArray[np.uint8]:
    """The bytes of an initializer, mapped if they are external."""
    import onnx_ir as ir

    stored = value.const_value
    assert stored is not None
    if isinstance(stored, ir.ExternalTensor):
        return _external(stored, file)
    try:
        data = np.frombuffer(stored.tobytes(), np.uint8)
    except (TypeError, ValueError) as error:  # elements of another type or number than it says
        raise InputError(file, f"{stored.name} cannot be read ({error})", BROKEN) from error
    if len(data) != stored.nbytes:
        raise InputError(file, f"{stored.name} has {len(data)} bytes, not {stored.nbytes}", BROKEN)
    return data


def _external(stored: ir.ExternalTensor, file: Path) -> NDArray[np.uint8]:
    """The bytes of an external tensor, mapped."""
    path = file.parent / str(stored.location)
    if not _is_beside(path, file) and not path.resolve().is_relative_to(file.parent.resolve()):
        raise InputError(file, f"{stored.name} lies outside the folder, in {stored.location}", BROKEN)
    if not path.is_file():
        raise InputError(path, "the file is missing", BROKEN)
    start, length = stored.offset or 0, int(stored.nbytes if stored.length is None else stored.length)
    if length != stored.nbytes or start + length > path.stat().st_size:
        raise InputError(path, f"is too short for {stored.name}", BROKEN)
    return _mapped(path)[start : start + length] if length else np.empty(0, np.uint8)


# The files of which bytes are in use, by what tells one from another. Each mapping keeps its file open, and a graph has
# more tensors than a process may have open files.
_MAPPED: WeakValueDictionary[tuple[str, int, int, int, int], NDArray[np.uint8]] = WeakValueDictionary()


def _mapped(path: Path) -> NDArray[np.uint8]:
    """All bytes of a file that has some, mapped once however many tensors lie in it."""
    found = path.stat()
    key = (str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    mapped = _MAPPED.get(key)
    if mapped is None:
        mapped = _MAPPED[key] = np.memmap(path, np.uint8, "r")
    return mapped


def _is_beside(path: Path, file: Path) -> bool:
    """Whether a path is a name in the folder of `file` and no link, which needs no resolving: as good as always."""
    return path.parent == file.parent and path.name != ".." and not path.is_symlink()


class Elements:
    """The elements of an initializer by their place in it; below a byte, the first lies in the lowest bits.

    (onnx.proto, TensorProto.DataType: a tensor is packed as one run.)
    """

    def __init__(self, value: ir.Value, file: Path) -> None:
        self.kind, self.shape = described(value, file)
        assert value.dtype is not None
        self.bits = SUB_BYTE.get(self.kind, 8 * int(value.dtype.itemsize))
        self.signed = self.kind.startswith("INT")
        self._raw = raw(value, file)
        self._dtype = np.dtype(NUMPY_DTYPES.get(self.kind) or value.dtype.numpy())

    def at(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """The elements at `places`: integers as they are, FLOAT4E2M1 as its codes, other floats as float32."""
        if self.kind in SUB_BYTE:
            per, half = 8 // self.bits, np.uint8(1 << (self.bits - 1))
            shifts = (places % per * self.bits).astype(np.uint8)
            codes = (self._raw[places // per] >> shifts) & np.uint8((1 << self.bits) - 1)
            return ((codes ^ half) - half).view(np.int8) if self.signed else codes
        found = self._raw.view(self._dtype)[places]
        if self.kind in INTEGERS:
            return found
        return to_floats(found) if self.kind in FLOATS else found.astype(np.float32)

    def stored(self) -> NDArray[Any]:
        """All of them as they are stored, in their shape: mapped, bf16 as its bit patterns; of types of whole bytes."""
        return self._raw.view(self._dtype).reshape(self.shape)

    def whole(self) -> NDArray[Any]:
        """All of them, in their shape."""
        return self.at(np.arange(int(np.prod(self.shape)))).reshape(self.shape)
