"""A saved ML program, opened: the package folder, its protobuf, and the arrays that the program's constants stand for.

Nothing is executed and no weight is read: big constants are mapped, quantized ones (`constexpr_…` operations) are
arrays that dequantize the rows they are asked for (formats: coremltools' Model.proto and MIL.proto).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.coreml.arrays import Array, Nonzero, Palette, ShiftScale, Spread, Stored, sparse, spread
from gemexport.formats.coreml.blob import TYPES, BlobFile, unpack
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.reading import read_bytes, read_json

MODEL = PurePosixPath("com.apple.CoreML/model.mlmodel")
WEIGHTS = PurePosixPath("com.apple.CoreML/weights")
MAX_MODEL_BYTES = 256 << 20  # of the program, whose large arrays lie beside it
_REMEDY = "give a whole .mlpackage folder that holds an ML program"
_FLOATS = {"FLOAT16": "fp16", "FLOAT32": "fp32", "FLOAT64": "fp64", "BFLOAT16": "bf16"}
_BYTES = {"fp16", "int8", "uint8", "uint32", *(kind.name for kind in TYPES.values() if kind.bits < 8)}
Value: TypeAlias = Array | str | list[Any]


def coremltools() -> Any:
    """The coremltools package without the warnings it greets Linux and a newer PyTorch with."""
    logging.getLogger("coremltools").addFilter(_worth_saying)
    import coremltools as module

    return module


def _worth_saying(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@dataclass(frozen=True)
class Type:
    """Element type (MIL's name) and shape of a value; -1 for a dimension known when it runs."""

    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Package:
    """A package: its model protobuf and the operations of its main function."""

    path: Path
    model: Any  # Model_pb2.Model
    folder: Path  # where the model file lies; @model_path in the program
    _files: dict[Path, BlobFile] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        """What the author wrote into the model."""
        return dict(self.model.description.metadata.userDefined)

    @property
    def function(self) -> Any:
        """The main function (MIL_pb2.Function)."""
        functions = self.model.mlProgram.functions
        name = self.model.description.defaultFunctionName or "main"
        if name not in functions:
            raise InputError(self.path, f"its program has no function {name!r}", _REMEDY)
        return functions[name]

    @property
    def operations(self) -> Any:
        """The operations of the main function, in order (MIL_pb2.Operation)."""
        function = self.function
        return function.block_specializations[function.opset].operations

    @property
    def outputs(self) -> list[str]:
        """The names of what the main function gives."""
        function = self.function
        return list(function.block_specializations[function.opset].outputs)

    def value(self, proto: Any) -> Value:
        """What a MIL_pb2.Value stands for: an array (mapped if it is in the weight file), or a string."""
        if proto.type.WhichOneof("type") == "listType":
            return [self.value(item) for item in proto.immediateValue.list.values]
        kind, shape = (found := typed(proto.type)).kind, found.shape
        if proto.WhichOneof("value") == "blobFileValue":
            count = int(np.prod(shape, dtype=np.int64))
            blob = self._file(proto.blobFileValue.fileName).blob(proto.blobFileValue.offset, kind, count)
            return Stored(kind, shape, blob)
        tensor = proto.immediateValue.tensor
        content = getattr(tensor, tensor.WhichOneof("value") or "floats").values
        if kind == "string":
            return str(content[0]) if shape == () else [str(item) for item in content]
        return Stored(kind, shape, _immediate(content, kind, shape))

    def _file(self, name: str) -> BlobFile:
        parts = PurePosixPath(name).parts
        if parts[:1] != ("@model_path",) or ".." in parts:
            raise InputError(self.path, f"its program reads {name!r}, outside the package", _REMEDY)
        path = self.folder.joinpath(*parts[1:])
        if path not in self._files:
            self._files[path] = BlobFile(path)
        return self._files[path]


def everything(operations: Iterable[Any]) -> Iterator[Any]:
    """The operations and those in their blocks (MIL_pb2.Operation), in order."""
    for operation in operations:
        yield operation
        for block in operation.blocks:
            yield from everything(block.operations)


def open_package(path: str | Path) -> Package:
    """The package in folder `path`; weights stay unread.

    Raises InputError for what is not a package, is broken, or holds no ML program.
    """
    path = Path(path)
    try:
        manifest = read_json(path / "Manifest.json", _REMEDY)
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except FileNotFoundError as error:
        raise InputError(path, "there is no Manifest.json", _REMEDY) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(path / "Manifest.json", f"is not a package's manifest ({error!r})", _REMEDY) from error
    parts = PurePosixPath(str(item)).parts
    if ".." in parts or parts[:1] == ("/",):
        raise InputError(path / "Manifest.json", f"names {item!r}, outside the package", _REMEDY)
    model_path = path.joinpath("Data", *parts)
    coremltools()
    from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError

    model = Model_pb2.Model()
    try:
        model.ParseFromString(read_bytes(model_path, MAX_MODEL_BYTES))
    except (OSError, DecodeError) as error:
        raise InputError(model_path, f"cannot be read as a Core ML model ({error})", _REMEDY) from error
    if model.WhichOneof("Type") != "mlProgram":
        raise InputError(model_path, f"is a {model.WhichOneof('Type') or 'damaged model'}, not an ML program", _REMEDY)
    return Package(path, model, model_path.parent)


def typed(proto: Any) -> Type:
    """Element type and shape of a MIL_pb2.ValueType; of a state, of what it wraps."""
    if proto.WhichOneof("type") == "stateType":
        proto = proto.stateType.wrappedType
    from coremltools.proto import MIL_pb2

    tensor = proto.tensorType
    name = MIL_pb2.DataType.Name(tensor.dataType)
    sizes = (d.constant.size if d.WhichOneof("dimension") == "constant" else -1 for d in tensor.dimensions)
    return Type(_FLOATS.get(name, name.lower()), tuple(sizes))


def _immediate(content: Any, kind: str, shape: tuple[int, ...]) -> NDArray:
    """A constant written into the program itself."""
    if kind in _BYTES:
        raw = np.frombuffer(content, np.uint8)
        stored = TYPES[kind]
        count = int(np.prod(shape, dtype=np.int64))
        whole = raw.view(stored.dtype) if stored.bits >= 8 else unpack(raw, stored.bits, 0, count, stored.signed)
        return whole.reshape(shape)
    dtypes = {"fp32": np.float32, "fp64": np.float64, "bool": np.bool_}
    return np.array(list(content), dtypes.get(kind, np.int32)).reshape(shape)


def constant(package: Package, operation: Any, known: Mapping[str, Value]) -> dict[str, Value]:
    """What the outputs of a `const` or `constexpr_…` operation stand for, by name; nothing for any other operation.

    `known` holds the constants before it, which a constexpr operation may refer to by name. Raises InputError for a
    kind of constexpr that is not known here.
    """
    if operation.type == "const":
        return {operation.outputs[0].name: package.value(operation.attributes["val"])}
    if not operation.type.startswith("constexpr_"):
        return {}
    arguments: dict[str, Any] = {
        name: package.value(proto) for name, proto in operation.attributes.items() if name != "name"
    }
    for name, argument in operation.inputs.items():
        (binding,) = argument.arguments
        named = binding.WhichOneof("binding") == "name"
        arguments[name] = known[binding.name] if named else package.value(binding.value)
    if operation.type not in _CONSTEXPR:
        raise InputError(package.path, f"the operation {operation.type} is not known", "report it, with the package")
    results = _CONSTEXPR[operation.type](**arguments)
    values = results if isinstance(results, tuple) else (results,)
    return {output.name: value for output, value in zip(operation.outputs, values, strict=True)}


def _shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    return ShiftScale(data, scale, offset)


def _affine(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    # iOS 16's form: one scale and zero point in all, or one for each index along `axis`.
    shape = [1] * len(quantized_data.shape)
    if scale.shape or zero_point.shape:
        along = int(axis.numpy())
        shape[along] = quantized_data.shape[along]
    return ShiftScale(quantized_data, spread(scale, shape), spread(zero_point, shape))


def _palette(indices: Array, lut: Array, vector_axis: Array | None = None, shape: Array | None = None) -> Array:
    if shape is None:
        return Palette(indices, lut, None if vector_axis is None else int(vector_axis.numpy()))
    # iOS 16's form: one flat table, and indices packed into bytes, lowest bits first.
    size = tuple(int(n) for n in shape.numpy())
    bits = int(np.log2(lut.shape[0]))
    codes = unpack(indices.numpy(), bits, 0, int(np.prod(size, dtype=np.int64)), signed=False).reshape(size)
    table = spread(lut, [1] * len(size) + [lut.shape[0], 1])
    return Palette(Stored("uint8", size, codes), table, None)


def _sparse(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    if shape is None:
        return sparse(nonzero_data, mask)
    # iOS 16's form: a mask of packed bits, lowest first.
    size = tuple(int(n) for n in shape.numpy())
    bits = unpack(mask.numpy(), 1, 0, int(np.prod(size, dtype=np.int64)), signed=False)
    return sparse(nonzero_data, Stored("uint1", size, bits.reshape(size)))


def _sparse_palette(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Array | None = None
) -> tuple[Array, Array]:
    dense = _palette(sparse(indices_nonzero_data, indices_mask), lut, vector_axis)
    size, mask = lut.shape[-1], indices_mask
    if size > 1 and vector_axis is not None:
        mask = Spread(indices_mask, int(vector_axis.numpy()), size)
    return mask, Nonzero(dense, mask)


def _sparse_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    return data_mask, Nonzero(ShiftScale(sparse(nonzero_data, data_mask), scale, offset), data_mask)


def _cast(source_val: Array, output_dtype: str) -> Array:
    return source_val


_CONSTEXPR: dict[str, Callable[..., Array | tuple[Array, Array]]] = {
    "constexpr_blockwise_shift_scale": _shift_scale,
    "constexpr_affine_dequantize": _affine,
    "constexpr_lut_to_dense": _palette,
    "constexpr_cast": _cast,
    "constexpr_sparse_to_dense": _sparse,
    "constexpr_lut_to_sparse": _sparse_palette,
    "constexpr_sparse_blockwise_shift_scale": _sparse_shift_scale,
}
