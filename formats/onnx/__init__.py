"""The weights of an ONNX model, read back from its graph by the names of the checkpoint.

An initializer says little by itself: the operator that reads it says whether it is packed, and which way round. Data
stay in the file, mapped, until rows are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.gemma.dialects import genai_canonical
from gemexport.formats.gemma.names import EMBEDDING, HEAD, role_of
from gemexport.formats.grids.additive import AdditiveTensor
from gemexport.formats.grids.vector_codec import Codec, parse, stated_rms
from gemexport.formats.onnx import builder as onnx_builder
from gemexport.formats.onnx.blocks import PackedTensor, StoredTensor, to_floats, unpack_unsigned
from gemexport.formats.onnx.dequantized import REMEDY, dequantized
from gemexport.formats.onnx.form import BROKEN, WIDTHS, check
from gemexport.formats.onnx.stored import FLOATS, array, needed
from gemexport.formats.onnx.walk import Use, attribute, constant, multiplying, turned, uses
from gemexport.formats.pieces import Pieces, whole
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.reading import regular
from gemexport.formats.tensor import Floats, Rows, Tensor, TensorBase

if TYPE_CHECKING:
    import onnx_ir as ir

NESTED = "onnx"  # the folder in which transformers.js wants the graph
GRAPHS = ("model.onnx", "embeddings.onnx", "prefill.onnx", "decode.onnx")
# On an initializer whose grid no operator names: a packed table that standard operators look rows up in.
BITS = "gemexport.bits"
COPY = "gemexport.copy_of"  # on an initializer that holds another weight once more, in another layout
DERIVED = "gemexport.derived_from"  # on an initializer that holds another weight on a coarser grid
OFFSET = "gemexport.offset"  # on an initializer that has had this number added
CODEC = "gemexport.codec"  # on the codes of a matrix in the vector codec: its spelling
FITTED_RMS = "gemexport.fitted_rms"  # beside it: the error that the fit measured
SHAPE = "gemexport.shape"  # on a matrix that is a stack of matrices: the stack's shape, "experts,out,in"
CODEBOOKS = ".codebooks"  # what its codebooks are called, after its own name
SCALES, ZEROS = ".scales", ".zero_points"  # what a weight's scales and zero points are called, after its own name

MAX_GRAPH_BYTES = 2 << 30  # of a graph without its external data: protobuf has no larger

Place = tuple[str, int] | None  # the file of external data and the offset in it


# Outputs of a graph that makes one vector of a text, as onnx-community's models call them.
HIDDEN_OUTPUT, EMBEDDING_OUTPUT = "last_hidden_state", "sentence_embedding"


def tensors(path: str | Path) -> dict[str, Tensor]:
    """The weights of a model by canonical name, mapped: of an .onnx file, or of the `GRAPHS` in a folder.

    Raises InputError for a file that is not whole, external data that are missing, too short or outside the folder,
    graphs of one folder that disagree on a weight, and weights in a layout that is not known here.
    """
    path = Path(path)
    found: dict[str, Tensor] = {}
    places: dict[str, Place] = {}
    copies: dict[str, str] = {}
    for file in graph_files(path):
        model = read_model(file)
        in_graph: dict[str, Tensor] = {}
        for tensor, place, original in _weights(model.graph, file):
            if places.setdefault(tensor.name, place) != place:
                raise InputError(file, f"{tensor.name} is another one than in the graph beside it", BROKEN)
            in_graph.setdefault(tensor.name, tensor)
            if original is not None:
                copies[tensor.name] = original
        if model.producer_name == onnx_builder.PRODUCER:
            in_graph = onnx_builder.conform(in_graph, model.graph, file.parent)
        found = in_graph | found
    if HEAD in found and places[HEAD] is not None and places[HEAD] == places.get(EMBEDDING):
        del found[HEAD]  # the embedding's own bytes, under the shape that the other operator wants
    for name, original in copies.items():
        if original == name or original not in found or name not in found:
            raise InputError(path, f"{name} is said to be a copy of {original!r}", BROKEN)
        found[original] = CopiedTensor(found[original], found.pop(name), path)
    return found


def derived(path: str | Path) -> dict[str, tuple[str, Tensor]]:
    """The weights that a model holds once more on a coarser grid, by name, each with the name of what it is made of.

    `tensors` has none of them. Raises InputError as it does.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for file in graph_files(Path(path)):
        for tensor, _, original in _weights(read_model(file).graph, file, DERIVED):
            found.setdefault(tensor.name, (original or "", tensor))
    return found


def graph_files(path: Path) -> list[Path]:
    """The graphs of a model: an .onnx file, or the `GRAPHS` in a folder, or the one graph in its folder `onnx`.

    Raises InputError where there are none, or several models in `onnx`.
    """
    files = [path] if path.is_file() else [path / name for name in GRAPHS if (path / name).is_file()]
    files = files or sorted((path / NESTED).glob("*.onnx"))
    if files and files[0].parent != path and path.is_dir() and len(files) > 1:
        raise InputError(path, f"there are {len(files)} models in {NESTED}", "give the path of one of them")
    if not files:
        raise InputError(path, "there is no ONNX model", f"give an .onnx file, or a folder with {' or '.join(GRAPHS)}")
    return files


def data_files(file: Path) -> list[Path]:
    """Where the weights of an .onnx file lie besides it, by its own word; InputError for a file that is not whole."""
    import onnx_ir as ir

    stored = (value.const_value for value in read_model(file).graph.initializers.values())
    places = {str(item.location) for item in stored if isinstance(item, ir.ExternalTensor)}
    return [file.parent / place for place in sorted(places) if (file.parent / place).is_file()]


class CopiedTensor(TensorBase):
    """A tensor that an artefact holds twice; reading rows that differ raises InputError."""

    def __init__(self, first: Tensor, second: Tensor, path: Path) -> None:
        self.first, self.second, self.path = first, second, path
        self.name, self.shape, self.dtype, self.grid = first.name, first.shape, first.dtype, first.grid
        self.requantized, self.fitted_rms = first.requantized, first.fitted_rms

    def rows(self, start: int, stop: int) -> Rows:
        rows = self.first.rows(start, stop)
        if not np.array_equal(rows.values, self.second.rows(start, stop).values):
            raise InputError(self.path, f"{self.second.name} is not {self.name}, which it is tied to", BROKEN)
        return rows


def canonical_name(name: str) -> str | None:
    """The checkpoint's name of an initializer; None for what is no weight.

    Knows its own names and those of ONNX Runtime GenAI's model builder.
    """
    name = re.sub(r"_(Q\d+(G\d+)?|quant|quantized|qweight)$", "", name).replace(".MatMul.weight", ".weight")
    name = genai_canonical(name)
    known = role_of(name) is not None
    return name if known or (name.startswith("model.") and name.endswith(".weight")) else None


def read_model(file: Path) -> ir.Model:
    """The model in an .onnx file, without its external data; InputError when it is not whole, or has odd operators."""
    import onnx_ir as ir

    try:
        regular(file, MAX_GRAPH_BYTES)
        model = ir.load(file)
    except InputError:
        raise
    except Exception as error:
        raise InputError(file, "is not a whole ONNX model", BROKEN) from error
    check(model.graph, file)
    return model


def _weights(graph: ir.Graph, file: Path, kind: str = COPY) -> Iterator[tuple[Tensor, Place, str | None]]:
    """Each weight of one graph, where its data lie, and the name of the weight that it copies; or those `DERIVED`."""
    import onnx_ir as ir

    for value in graph.initializers.values():
        name = canonical_name(value.name or "")
        stored = value.const_value
        if stored is None or (DERIVED in stored.metadata_props) != (kind == DERIVED):
            continue
        if name is None:
            _check_nameless(value, file)
            continue
        tensor = _weight(name, value, graph, file)
        if tensor is not None and SHAPE in stored.metadata_props:
            tensor = _stack(tensor, stored.metadata_props[SHAPE], file)
        if tensor is not None:
            place = (str(stored.location), stored.offset or 0) if isinstance(stored, ir.ExternalTensor) else None
            yield tensor, place, stored.metadata_props.get(kind)


def _check_nameless(value: ir.Value, file: Path) -> None:
    """Raise InputError for a matrix that a graph multiplies by and that no tensor of a checkpoint is called like."""
    sizes = () if value.const_value is None else value.const_value.shape.numpy()
    use = multiplying(value) if len(sizes) > 1 and min(sizes[-2:]) > 1 else None
    if use is not None:
        problem = f"{use.called} multiplies by {value.name}, which is no name of a checkpoint's tensor"
        raise InputError(file, problem, "export it with the checkpoint's names")


def _weight(name: str, value: ir.Value, graph: ir.Graph, file: Path) -> Tensor | None:
    """The tensor that an initializer holds, by the first operator that reads it; None where none does.

    Raises InputError, naming the initializer and the operator, for a layout that is not known here.
    """
    assert value.const_value is not None
    assert value.dtype is not None
    bits, codec = (value.const_value.metadata_props.get(key) for key in (BITS, CODEC))
    if codec:
        return _additive(name, value, parse(codec), graph, file)
    if bits:
        return _table(name, value, bits, graph, file)
    found = list(uses(value))
    for use in found:
        if use.reads("MatMulNBits", 1) or use.reads("GatherBlockQuantized", 0):
            return _fused(name, use.node, use.index, file)
        if use.reads("DequantizeLinear", 0) or use.reads("QuantizeLinear", 0):
            return _dequantized(name, value, use, file)
    if value.dtype.name in FLOATS:
        return StoredTensor(name, array(value, file), transposed=turned(value))
    if not found:
        return None
    raise InputError(file, f"{found[0].called} reads {value.name} ({value.dtype.name}) in a way not known here", REMEDY)


def _stack(tensor: Tensor, spelling: str, file: Path) -> Tensor:
    """A matrix as the stack that it is: the rows of all, one below the other, or their columns side by side."""
    rows, width = tensor.shape
    numbers = spelling.split(",")
    shape = tuple(int(size) for size in numbers if size.isdecimal())
    below = len(shape) == len(numbers) == 3 and (rows, width) == (shape[0] * shape[1], shape[2])
    beside = len(shape) == len(numbers) == 3 and (rows, width) == (shape[1], shape[0] * shape[2])
    if not below and not beside:
        raise InputError(file, f"{tensor.name} is {rows} x {width} and no stack of {spelling}", BROKEN)
    assert isinstance(tensor, PackedTensor | StoredTensor)
    steps = range(0, width, shape[2])
    parts = [tensor] if len(steps) == 1 else [tensor.columns(step, step + shape[2]) for step in steps]
    return Pieces(tensor.name, shape, map(whole, parts))


def _table(name: str, value: ir.Value, spelling: str, graph: ir.Graph, file: Path) -> Tensor:
    """Packed rows that standard operators look up; zero points, one a byte, beside the scales."""
    scales, zeros = graph.initializers.get(f"{value.name}{SCALES}"), graph.initializers.get(f"{value.name}{ZEROS}")
    if scales is None or spelling not in map(str, WIDTHS):
        raise InputError(file, f"{value.name} has no scales, or codes of {spelling!r} bits", BROKEN)
    bits = int(spelling)
    zero_points = None if zeros is None else to_floats(array(zeros, file)) - np.float32(1 << (bits - 1))
    return _unsigned(name, array(value, file), array(scales, file), bits, zero_points, file)


def _unsigned(
    name: str, packed: NDArray[Any], scales: NDArray[Any], bits: int, zero_points: Floats | None, file: Path
) -> PackedTensor:
    """Rows of unsigned codes with the scales of blocks along `in`; InputError for arrays that do not fit together."""
    zeros = scales.shape if zero_points is None else zero_points.shape
    rows = packed.ndim == scales.ndim == 2 and len(packed) == len(scales) and zeros == scales.shape
    if not rows or not scales.size or packed.dtype.itemsize != 1 or packed.shape[1] * 8 // bits % scales.shape[1]:
        sizes = ", ".join(str(list(size)) for size in (packed.shape, scales.shape, zeros))
        raise InputError(file, f"bytes, scales and zero points of {name} do not fit together ({sizes})", BROKEN)
    return PackedTensor(name, packed, scales, bits, signed=False, transposed=False, zero_points=zero_points)


def _additive(name: str, value: ir.Value, codec: Codec, graph: ir.Graph, file: Path) -> Tensor:
    """Codes of the vector codec; codebooks and scales beside them."""
    if f"{value.name}{CODEBOOKS}" not in graph.initializers or f"{value.name}{SCALES}" not in graph.initializers:
        raise InputError(file, f"{value.name} has no codebooks or no scales", BROKEN)
    assert value.const_value is not None
    measured = stated_rms(value.const_value.metadata_props.get(FITTED_RMS), file)
    books, scales = (array(graph.initializers[f"{value.name}{part}"], file) for part in (CODEBOOKS, SCALES))
    codes, shape = array(value, file), (codec.codebooks, codec.entries, codec.vector)
    if codes.dtype != np.uint8 or books.size != np.prod(shape):
        raise InputError(file, f"the codes and codebooks of {value.name} are not those of {codec}", BROKEN)
    scales = scales if scales.dtype == np.float16 else to_floats(scales)
    books = to_floats(books).reshape(shape)
    return AdditiveTensor(name, codec, codes, books, scales, measured)


def _fused(name: str, node: ir.Node, index: int, file: Path) -> Tensor:
    """What MatMulNBits and GatherBlockQuantized of ONNX Runtime read: packed along `in`, unsigned."""
    bits = attribute(node, "bits", 4)
    if bits not in WIDTHS:
        raise InputError(file, f"{node.op_type} {node.name} unpacks {bits} bits", REMEDY)
    packed, scales = (array(needed(node, i, file), file) for i in (index, 2))
    # What is gathered may be matrices.
    leading = packed.shape[:1] if node.op_type == "MatMulNBits" else packed.shape[:-1]
    out = int(np.prod(leading))
    if not out or not packed.size or scales.size % out:
        problem = f"{node.op_type} {node.name} reads codes {list(packed.shape)} with scales {list(scales.shape)}"
        raise InputError(file, problem, BROKEN)
    packed = packed.reshape(out, -1)
    scales = scales.reshape(out, -1)
    zero_points = None
    stored = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    if stored is not None:
        zeros = array(stored, file)
        if zeros.size % out:
            raise InputError(file, f"{node.op_type} {node.name} reads zero points {list(zeros.shape)}", BROKEN)
        zeros = zeros.reshape(out, -1)
        fields = unpack_unsigned(zeros, bits)[:, : scales.shape[1]] if zeros.dtype == np.uint8 else to_floats(zeros)
        zero_points = fields.astype(np.float32) - (1 << (bits - 1))
    found = _unsigned(name, packed, scales, bits, zero_points, file)
    return found if len(leading) == 1 else Pieces(name, (*leading, found.shape[1]), [whole(found)])


def _dequantized(name: str, value: ir.Value, use: Use, file: Path) -> Tensor:
    """What DequantizeLinear makes of an initializer: of a vector, the integers that an NPU multiplies by."""
    tensor = dequantized(name, value, use, file)
    if isinstance(tensor, PackedTensor) or len(tensor.shape) > 1:
        return tensor
    assert value.const_value is not None
    stated = value.const_value.metadata_props.get(OFFSET, "0")
    try:
        offset = float(stated)
    except ValueError as error:
        raise InputError(file, f"{value.name} is said to be {stated!r} too large", BROKEN) from error
    return StoredTensor(name, (tensor.exact() - offset).astype(np.float32), requantized=True)
