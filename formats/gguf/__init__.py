"""What a GGUF file of a Gemma decoder holds: its tensors under canonical names and with canonical values.

llama.cpp's Gemma 3 multiplies by a norm's weight where the checkpoint means 1 + weight, so files hold the sum: that is
undone here. The container is `container`, the byte layouts of blocks are `blocks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import MODEL_ARCH_NAMES, GGMLQuantizationType, Keys, LlamaFileType
from gguf.quants import dequantize
from gguf.tensor_mapping import get_tensor_name_map

from gemexport.formats.gemma.architecture import GATHERINGS, SPREADS, TensorSpec
from gemexport.formats.gemma.families import FAMILIES, by_gguf
from gemexport.formats.gemma.families.family import Family
from gemexport.formats.gemma.names import CANONICAL, PER_LAYER_EMBEDDING, WEIGHT, role_of
from gemexport.formats.gemma.roles import Role
from gemexport.formats.gemma.stacks import by_projection, put
from gemexport.formats.gguf.blocks import BLOCK, Bytes
from gemexport.formats.gguf.container import MENDED, Container, Description, Writer
from gemexport.formats.gguf.layouts import LAYOUTS
from gemexport.formats.gguf.parts import Parts, read_parts
from gemexport.formats.pieces import Piece, Pieces
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import DType, Grid, Rows, Tensor, TensorBase, from_bf16, row_slices
from gemexport.formats.unclaimed import check_unclaimed

_ARCHITECTURES = {name: key for key, name in MODEL_ARCH_NAMES.items()}
MAX_LAYERS = 512  # llama.cpp's own limit

ROPE_FREQUENCIES = "rope_freqs.weight"  # factors of rotary embeddings, which the metadata speak of
Q_NORM_FACTOR = "gemexport.q_norm_factor"
"""Metadata key (float32): what the query norms were multiplied by, where llama.cpp's attention scale is another."""

# Factors that lie beside a matrix, as its scale (src/models/gemma4.cpp); no other matrix has one.
_BESIDE = {Role.ROUTER_SCALE: Role.ROUTER, Role.EXPERT_SCALE: Role.EXPERT_DOWN}
# What gguf-py's map calls modules that are none of transformers'.
_OWN = {Role.FIRST_DENSE: "dense_2_out", Role.SECOND_DENSE: "dense_3_out"}
# Matrices of which the file has a stack, by the name of that in gguf-py's map.
STACKS = {roles: CANONICAL.name(roles[0]).removesuffix(f".0{WEIGHT}") for roles in (SPREADS, GATHERINGS)}
PER_LAYER_ROWS = "gemexport.per_layer_vocabulary"
"""Metadata key (uint32): how many rows of the per-layer embeddings are the model's; the rest is the first of them."""
# Other converters keep the gate and the up projections of experts apart, which llama.cpp takes as well.
_APART = ("blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_up_exps.weight", "blk.{}.ffn_down_exps.weight")
# Mixes of types that hold no lattice: who asks for one asks for new codes. The lattices' own types are not among them.
_REQUANTIZED = {kind.value for kind in LlamaFileType if "_K" in kind.name or "_IQ" in kind.name}
FLOATS: dict[GGMLQuantizationType, DType] = {
    GGMLQuantizationType.F32: "f32",
    GGMLQuantizationType.F16: "f16",
    GGMLQuantizationType.BF16: "bf16",
}
# Tables of which only rows are looked up: nothing is multiplied by them.
LOOKED_UP = frozenset(("per_layer_token_embd.weight",))


def file_names(family: Family[Any], layers: int) -> dict[str, str]:
    """The file's name of every tensor that a decoder of `layers` layers may have, by canonical name."""
    names = get_tensor_name_map(_ARCHITECTURES[family.gguf], layers)
    found = {}
    for layer in (None, *range(layers)):
        for role in (role for role in Role if role.in_layer == (layer is not None)):
            theirs = CANONICAL.name(_BESIDE.get(role, role), layer).removesuffix(WEIGHT)
            stem = names.get_name(_OWN.get(role, theirs))
            if stem is not None:
                found[CANONICAL.name(role, layer)] = f"{stem}.{'scale' if role in _BESIDE else 'weight'}"
    return found


def stack_names(family: Family[Any]) -> dict[str, tuple[str, ...]]:
    """The file's names of stacks of matrices, each with the canonical names of the matrices."""
    names = get_tensor_name_map(_ARCHITECTURES[family.gguf], 1)
    found = {}
    for roles, theirs in STACKS.items():
        stem = names.get_name(theirs)
        if stem is not None:
            found[f"{stem}.weight"] = tuple(CANONICAL.name(role) for role in roles)
    return found


def norm_shift(family: Family[Any], name: str, q_norm_factor: float = 1.0) -> tuple[float, float]:
    """`(offset, factor)` of a canonical vector: the file holds `(value + offset) * factor`."""
    role = role_of(name)
    offset = family.norm_offset if role is not None and role.is_norm else 0.0
    return offset, q_norm_factor if role is Role.Q_NORM else 1.0


class StoredTensor(TensorBase):
    """A tensor of a GGUF file under its canonical name; `rows` evaluates the stored numbers without rounding.

    Where the file holds (value + offset) * factor, as it does of norms, that is undone.
    """

    def __init__(
        self, container: Container, stored: Description, name: str, offset: float = 0.0, factor: float = 1.0
    ) -> None:
        self.name = name
        self.stored_name = stored.name
        self.shape = stored.shape
        self.type = stored.type
        self.dtype: DType = FLOATS.get(stored.type, "f32")
        self.requantized = _is_requantized(container, stored)
        matrix = len(stored.shape) >= 2  # a vector may be shifted, and codes are not
        self.grid: Grid | None = LAYOUTS[stored.type].grid if matrix and stored.type in LAYOUTS else None
        self._container = container
        self._stored = stored
        self._offset = offset
        self._factor = factor

    def rows(self, start: int, stop: int) -> Rows:
        rows = _evaluate(self._container, self._stored, start, stop)
        if self._offset == 0.0 and self._factor == 1.0:
            return rows
        return Rows((rows.values.astype(np.float64) / self._factor - self._offset).astype(np.float32))

    def blocks(self, start: int, stop: int) -> Bytes:
        """The bytes of rows `start` to `stop` as they are in the file, `[rows, bytes of a row]`, mapped."""
        return self._container.rows(self._stored, start, stop)


def _is_requantized(container: Container, stored: Description) -> bool:
    """Whether the file says that this matrix' codes were fitted to its values, which is what a K-quant file means.

    F16 is what such a file has for rows that no block divides.
    """
    said = container.metadata.get(Keys.General.FILE_TYPE)
    if not isinstance(said, int) or said not in _REQUANTIZED or len(stored.shape) < 2:
        return False
    odd = stored.type == GGMLQuantizationType.F16 and stored.shape[-1] % BLOCK != 0
    return odd or stored.type not in FLOATS


def _evaluate(container: Container, stored: Description, start: int, stop: int) -> Rows:
    """Rows of a tensor as numbers; leading axes count as one."""
    data = container.rows(stored, start, stop)
    if stored.type in LAYOUTS:
        return LAYOUTS[stored.type].rows(data)
    if stored.type == GGMLQuantizationType.BF16:
        return Rows(from_bf16(data.view("<u2")))
    if stored.type in FLOATS:
        numbers = data.view("<f4" if stored.type == GGMLQuantizationType.F32 else "<f2")
        return Rows(numbers.astype(np.float32))
    return Rows(np.asarray(dequantize(data, stored.type), dtype=np.float32))


def write_f32(source: Path, target: Path) -> None:
    """A copy of the GGUF file `source` in which every matrix is F32, its numbers evaluated; all else stays.

    Tables of which only rows are looked up stay too: what is looked up comes out as float32. llama.cpp computes the
    copy without rounding activations, which shows what the file's numbers and metadata mean. Raises InputError for a
    broken file and for types that gguf cannot evaluate.
    """
    parts = read_parts(source)
    shapes = {name: stored.shape for name, (_, stored) in parts.stored.items()}
    with Writer(target, parts.containers[0].packed, shapes) as out:
        for name, (container, stored) in parts.stored.items():
            _check_type(container, stored)
            for start, stop in row_slices(stored.shape):
                if name in LOOKED_UP:
                    out.write(name, stored.type, container.rows(stored, start, stop))
                    continue
                rows = _evaluate(container, stored, start, stop)
                out.write(name, GGMLQuantizationType.F32, rows.values)


def tensors(path: Path) -> Mapping[str, Tensor]:
    """The decoder's tensors in the GGUF file at `path` and its other parts, mapped, by canonical name.

    Raises InputError for a broken file, for one of another architecture, for types that gguf cannot evaluate, and for a
    tensor of the decoder that no part claims.
    """
    parts = read_parts(path)
    stored, joined = stored_tensors(parts), joined_tensors(parts)
    left_out(parts, stored, joined)
    return {**stored, **{name: tensor for name, (tensor, _) in joined.items()}}


def left_out(
    parts: Parts, stored: Mapping[str, StoredTensor], joined: Mapping[str, tuple[Tensor, tuple[str, ...]]]
) -> tuple[str, ...]:
    """The file's names of what is none of these tensors; InputError for one that no part of the decoder claims."""
    used = {tensor.stored_name for tensor in stored.values()} | {name for _, names in joined.values() for name in names}
    family, layers = family_of(parts), layers_of(parts)
    unread = {stored for name, stored in file_names(family, layers).items() if _is_unread(family, name)}
    found = tuple(sorted(parts.stored.keys() - used - unread - {ROPE_FREQUENCIES}))
    for name in found:
        block = name.split(".")[1] if name.startswith("blk.") else ""
        if block.isdecimal() and int(block) >= layers:
            problem = f"block_count says {layers}, and there is {name}"
            raise InputError(parts.path, problem, MENDED)
    check_unclaimed(parts.path, found, used)
    return found


def stored_tensors(parts: Parts) -> dict[str, StoredTensor]:
    """As `tensors`, of files that are read already, without what is there in two parts."""
    family, layers = family_of(parts), layers_of(parts)
    factor = q_norm_factor_of(parts)
    names = file_names(family, layers)
    found: dict[str, StoredTensor] = {}
    for name, stored_name in names.items():
        if _is_unread(family, name) or (name == PER_LAYER_EMBEDDING and PER_LAYER_ROWS in parts.metadata):
            continue
        if stored_name in parts.stored:
            container, stored = parts.stored[stored_name]
            _check_type(container, stored)
            second = f"{stored_name.removesuffix('.weight')}.scale"
            if second in parts.stored and second not in names.values():
                problem = f"tensor {stored_name} has another scale beside its blocks ({second}), which is not known"
                raise InputError(container.path, problem, "use a file of another type")
            offset, multiplied = norm_shift(family, name, factor)
            found[name] = StoredTensor(container, stored, name, offset, multiplied)
    return found


def joined_tensors(parts: Parts) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """Tensors that the file has in parts or as parts, by canonical name, and what it calls what they are made of.

    The first projections of experts whose halves are apart; matrices that are a stack; a table that has rows beyond.
    """
    found = {**_of_stacks(parts), **_shortened(parts)}
    for layer in range(layers_of(parts)):
        names = tuple(name.format(layer) for name in _APART[:2])
        if not all(name in parts.stored for name in names):
            continue
        halves = [StoredTensor(*parts.stored[name], name) for name in names]
        if len(halves[0].shape) != 3 or halves[0].shape != halves[1].shape:
            problem = f"tensors {' and '.join(names)} have the shapes {[list(half.shape) for half in halves]}"
            raise InputError(parts.path, problem, MENDED)
        count, each, width = halves[0].shape
        ours = CANONICAL.name(Role.EXPERT_GATE_UP, layer)
        spec = TensorSpec(ours, (count, 2 * each, width), Role.EXPERT_GATE_UP, layer)
        places = by_projection(spec, *(name.format(layer) for name in _APART))
        found[ours] = put(spec, zip(places, halves, strict=True)), names
    return found


def _is_unread(family: Family[Any], name: str) -> bool:
    """Whether llama.cpp asks for a tensor of this canonical name and does not read it."""
    role, layer = CANONICAL.find(name) or (None, None)
    last = family.gguf_reads_keys
    return role in (Role.K, Role.K_NORM, Role.V) and last is not None and layer is not None and layer >= last


def _of_stacks(parts: Parts) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    found: dict[str, tuple[Tensor, tuple[str, ...]]] = {}
    for stored_name, ours in stack_names(family_of(parts)).items():
        if stored_name not in parts.stored:
            continue
        container, stored = parts.stored[stored_name]
        _check_type(container, stored)
        if len(stored.shape) != 3 or stored.shape[0] > len(ours):
            problem = f"tensor {stored_name} has the shape {list(stored.shape)}, and should be {len(ours)} matrices"
            raise InputError(container.path, problem, MENDED)
        count, rows, width = stored.shape
        stack = StoredTensor(container, stored, stored_name)
        for index, name in enumerate(ours[:count]):
            piece = Piece(stack, index * rows, (index + 1) * rows)
            found[name] = Pieces(name, (rows, width), [piece]), (stored_name,)
    return found


def _shortened(parts: Parts) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """Per-layer embeddings without the rows that were added to them."""
    stored_name = file_names(family_of(parts), 1).get(PER_LAYER_EMBEDDING, "")
    if PER_LAYER_ROWS not in parts.metadata or stored_name not in parts.stored:
        return {}
    container, stored = parts.stored[stored_name]
    rows = parts.metadata[PER_LAYER_ROWS]
    if type(rows) is not int or not 0 < rows <= stored.shape[0]:
        raise InputError(parts.path, f"{PER_LAYER_ROWS} is {rows}", MENDED)
    _check_type(container, stored)
    table = StoredTensor(container, stored, PER_LAYER_EMBEDDING)
    short = Pieces(PER_LAYER_EMBEDDING, (rows, stored.shape[1]), [Piece(table, 0, rows)])
    return {PER_LAYER_EMBEDDING: (short, (stored_name,))}


def family_of(parts: Parts) -> Family[Any]:
    """The family that llama.cpp's name of the graph stands for."""
    name = str(parts.metadata.get(Keys.General.ARCHITECTURE))
    family = by_gguf(name)
    if family is None:
        known = " or ".join(dict.fromkeys(family.gguf for family in FAMILIES if family.gguf))
        raise InputError(parts.path, f"the architecture {name!r} is not known", f"give a GGUF file of {known}")
    return family


def layers_of(parts: Parts) -> int:
    """How many layers the file says that it has: not more than it has tensors."""
    layers = parts.metadata.get(Keys.LLM.BLOCK_COUNT.format(arch=family_of(parts).gguf))
    if not isinstance(layers, int) or not 0 < layers <= min(len(parts.stored), MAX_LAYERS):
        raise InputError(parts.path, f"says that it has {layers} layers", MENDED)
    return layers


def q_norm_factor_of(parts: Parts) -> float:
    """What the query norms were multiplied by (see Q_NORM_FACTOR)."""
    factor = parts.metadata.get(Q_NORM_FACTOR, 1.0)
    if not isinstance(factor, float) or not 0 < factor < np.inf:
        raise InputError(parts.path, f"{Q_NORM_FACTOR} is {factor}", MENDED)
    return factor


def _check_type(container: Container, stored: Description) -> None:
    """Raise InputError when `gguf` cannot evaluate the tensor's type."""
    if stored.type in FLOATS or stored.type in LAYOUTS:
        return
    try:
        dequantize(container.rows(stored, 0, 1), stored.type)
    except NotImplementedError as error:
        problem = f"tensor {stored.name} is stored as {stored.type.name}, which cannot be evaluated here"
        raise InputError(container.path, problem, "convert it to another type with llama-quantize") from error
