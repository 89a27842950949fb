"""compressed-tensors folders: Hugging Face checkpoints whose quantized modules hold codes and scales.

A module has `weight_packed` (32-bit words or bytes of codes, packed as in bitpack) or a `weight` of int8 or fp8 codes;
`weight_scale` for a tensor, a row, a group or a 2-D block; perhaps `weight_zero_point`, and for nvfp4
`weight_global_scale`. A weight is (code - zero point) * scale, or scale times the level of its code, which the global
scale divides (compressed_tensors.compressors; quantization.lifecycle.forward_helpers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.activations import Activations, LinearActivations, Quantizer
from gemexport.formats.checkpoint import READERS, Source, quantization_method
from gemexport.formats.checkpoint import read_config as read_json
from gemexport.formats.compressed_tensors.activations import caches, quantizer
from gemexport.formats.compressed_tensors.settings import Args, Quantization, Scheme, quantization
from gemexport.formats.gemma.model import architecture
from gemexport.formats.modules import Module, apart, finite_e4m3, read_source, reordered_note
from gemexport.formats.quantized import Layout, QuantizedTensor, floats, is_float, misshapen, runs
from gemexport.formats.storage.bitpack import Unsigned, unpack, words, zero_code
from gemexport.formats.storage.minifloat import E2M1, E2M3, E4M3, from_e4m3, from_e8m0, scaled
from gemexport.formats.storage.safetensors import FLOAT_DTYPES, MappedArray
from gemexport.formats.tensor import Floats, Tensor

# Codes in bytes: bits of a code, and what the codes mean.
PACKED_FLOATS = ((4, E2M1), (6, E2M3))
GROUPED = ("group", "tensor_group")  # strategies with a group_size
SCALES = (*FLOAT_DTYPES, "F8_E4M3", "U8")
ACTIVATION_SCALES = ("input_scale", "output_scale", "input_global_scale")
Read = Callable[[int, int], Floats]


def tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of the decoder in folder `path` under its canonical name, mapped; also of other tools' folders.

    That may be one of GPTQ or AWQ, which vLLM and transformers take as well. Raises InputError when a file is broken, a
    tensor is missing, or the quantization is none that is known here.
    """
    folder = Path(path)
    config = read_json(folder)
    reader = READERS.get(str(quantization_method(config)))
    found: Source = import_module(reader).source(folder, config) if reader else source(folder, read_config(folder))
    return dict(found.tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; InputError when there is none, or its quantization format is not known here."""
    config = read_json(folder)
    quantization(folder / "config.json", config)
    return config


def source(folder: Path, config: dict[str, Any]) -> Source:
    """The decoder in compressed-tensors folder `folder`: quantized modules on the grids of their codes."""
    settings = quantization(folder / "config.json", config)
    reader = _Reader(settings)
    found = read_source(folder, config, reader.read)
    decoder = architecture(config, folder / "config.json")
    cached, names = caches(folder, decoder, settings.kv_cache_scheme)
    left_out = tuple(name for name in found.left_out if name not in names)
    rounded = Activations(reader.linears, cached)
    return Source(found.tensors, left_out, tuple(reader.notes(bool(cached))), rounded or None)


class _Reader:
    """Makes tensors of modules, and remembers what it had to leave out."""

    def __init__(self, settings: Quantization) -> None:
        self._settings = settings
        self.linears: dict[str, LinearActivations] = {}
        self._activations: Counter[str] = Counter()
        self._reordered = 0

    def read(self, module: Module) -> Tensor | None:
        """The module's weight on its grid; None when it is plain."""
        packed, plain = module.arrays.get("weight_packed"), module.arrays.get("weight")
        if packed is not None and plain is not None:
            raise module.wrong("is there twice, packed and as it is", "download or save the model again")
        stored = packed or plain
        if stored is None or is_float(stored):
            if stored is not None and "weight_scale" in module.arrays:
                raise module.wrong("is to be rounded while the model runs", "save it with save_compressed=True")
            return None
        scheme = self._settings.scheme(module)
        if "weight_scale" not in module.arrays:
            raise module.wrong(f"is {stored.entry.dtype} without scales", "download or save the model again")
        self._round(module, scheme)
        if scheme is None and any(key in module.arrays for key in ACTIVATION_SCALES):
            self._activations["activations (static)"] += 1
        _check_shape(module)
        layout = _layout(module, stored, scheme.weights if scheme else None)
        self._reordered += apart(layout, module)
        return QuantizedTensor(module.name, module.shape, layout)

    def _round(self, module: Module, scheme: Scheme | None) -> None:
        """Keep the static scales of what goes into a module and comes out of it, and count what is none."""
        sides: dict[str, Quantizer] = {}
        for kind, args in (
            ("input", scheme.input_activations if scheme else None),
            ("output", scheme.output_activations if scheme else None),
        ):
            found = quantizer(module.arrays, kind, args) if args is not None else None
            if found is not None:
                sides[kind] = found
            elif args is not None:
                self._activations[f"{kind} activations ({args})"] += 1
        if sides:
            self.linears[module.name] = LinearActivations(**sides)

    def notes(self, cached: bool) -> list[str]:
        """What the tensors do not tell, one sentence each."""
        found = [f"the {kind} of {count} modules are left out" for kind, count in self._activations.items()]
        if self._settings.kv_cache_scheme is not None and not cached:
            found.append(f"the KV cache scheme ({self._settings.kv_cache_scheme}) is left out")
        return [*found, *reordered_note(self._reordered)]


def _check_shape(module: Module) -> None:
    """Raise InputError when `weight_shape` is not the shape that config.json gives the module."""
    stored = module.arrays.get("weight_shape")
    if stored is not None and tuple(stored.array.ravel().tolist()) != module.shape:
        found = stored.array.ravel().tolist()
        raise module.wrong(f"is a packed {found} where config.json says {list(module.shape)}")


def _layout(module: Module, stored: MappedArray, args: Args | None) -> Layout:
    """How the module's numbers lie, from the dtypes and shapes of its arrays; the scheme decides what these leave."""
    dtype, (out, width), shape = stored.entry.dtype, module.shape, stored.entry.shape
    block, scales = _scales(module, args)
    if "weight_packed" in module.arrays and dtype == "I32":
        bits = _packed_bits(module, stored, args)
        codes = _codes(stored, bits, width)
        return Layout(bits, block, codes, scales, _zero_points(module, bits, block, args))
    if "weight_packed" in module.arrays and dtype == "U8":
        known = [item for item in PACKED_FLOATS if shape == (out, width * item[0] // 8) and width * item[0] % 8 == 0]
        if not known:
            raise misshapen(module.name, stored, module.shape)
        bits, levels = known[0][0], scaled(known[0][1], 1 / _global_scale(module))
        return Layout(bits, block, _codes(stored, bits, width), scales, kind="codebook", levels=levels)
    if shape != module.shape:
        raise misshapen(module.name, stored, module.shape)
    if dtype == "I8":
        bits = args.num_bits if args else 8
        if not 2 <= bits <= 8:
            raise module.wrong(f"has codes of {bits} bits", "use codes of 2 to 8 bits")
        return Layout(bits, block, _bytes(module, stored, bits), scales, _zero_points(module, bits, block, args))
    if dtype == "F8_E4M3":
        codes = finite_e4m3(module, _codes(stored, 8, width))
        return Layout(8, block, codes, scales, kind="codebook", levels=E4M3)
    raise module.wrong(f"is stored as {dtype}", "use codes of 2 to 8 bits, fp4, fp6 or fp8 (E4M3)")


def _packed_bits(module: Module, stored: MappedArray, args: Args | None) -> int:
    """Bits of a code in 32-bit words: what the scheme says, if that many words are there."""
    out, width = module.shape
    fitting = [bits for bits in range(2, 9) if stored.entry.shape == (out, words(width, bits))]
    if args is not None and args.num_bits in fitting:
        return args.num_bits
    if args is not None or len(fitting) != 1:
        raise misshapen(module.name, stored, module.shape)
    return fitting[0]


def _codes(stored: MappedArray, bits: int, width: int) -> Callable[[int, int], Unsigned]:
    return lambda start, stop: unpack(stored.array[start:stop].view(np.uint8), bits, width)


def _bytes(module: Module, stored: MappedArray, bits: int) -> Callable[[int, int], Unsigned]:
    """Codes that have a byte each, signed."""

    def codes(start: int, stop: int) -> Unsigned:
        found = stored.array[start:stop].view(np.uint8) + np.uint8(zero_code(bits))
        if bits < 8 and found.size and found.max() >= 1 << bits:
            raise module.wrong(f"has codes of more than the {bits} bits that its scheme says")
        return found

    return codes


def _scales(module: Module, args: Args | None) -> tuple[int, Read]:
    """The block that shares a scale, and the scales `[rows, in // block]`."""
    stored = module.need("weight_scale")
    if stored.entry.dtype not in SCALES:
        raise module.wrong(f"has scales of {stored.entry.dtype}", f"use scales of {', '.join(SCALES)}")

    def decoded(start: int, stop: int) -> Floats:
        if stored.entry.dtype == "U8":
            return from_e8m0(stored.array[start:stop])
        if stored.entry.dtype == "F8_E4M3":
            return from_e4m3(stored.array[start:stop])
        return floats(stored, start, stop)

    block, read = _spread(module, stored, decoded, args)
    reordered = _reordered(module, block)
    if reordered is None:
        return block, read
    narrow, order = reordered
    return narrow, lambda start, stop: read(start, stop)[:, order]


def _global_scale(module: Module) -> float:
    """What divides every scale of a module."""
    stored = module.arrays.get("weight_global_scale")
    if stored is None:
        return 1.0
    if stored.entry.dtype != "F32" or stored.array.size != 1:
        raise misshapen(module.name, stored, (1,))
    found = float(stored.array.ravel()[0])
    if not 0 < found < np.inf:
        raise module.wrong(f"has a global scale of {found}", "download or save the model again")
    return found


def _spread(module: Module, stored: MappedArray, decoded: Read, args: Args | None) -> tuple[int, Read]:
    """Numbers for a tensor, a row, a group or a 2-D block, as one for each block of each row."""
    (out, width), shape = module.shape, stored.entry.shape
    if args is not None and args.strategy == "block" and args.block_structure is not None:
        high, wide = args.block_structure
        if high < 1 or wide < 1 or shape != (-(-out // high), -(-width // wide)):
            raise misshapen(module.name, stored, module.shape)
        # The last block may be cut short; what divides both is a block of every row.
        block = gcd(wide, width)
        column = np.arange(0, width, block) // wide

        def blocks(start: int, stop: int) -> Floats:
            return decoded(start // high, -(-stop // high))[np.arange(start, stop) // high - start // high][:, column]

        return block, blocks
    if stored.array.size == 1:
        return width, lambda start, stop: np.repeat(decoded(0, 1).reshape(1, 1), stop - start, axis=0)
    groups = shape[1] if len(shape) == 2 else 1
    if shape not in ((out,), (out, groups)) or groups < 1 or width % groups:
        raise misshapen(module.name, stored, module.shape)
    said = args.group_size if args is not None and args.strategy in GROUPED else None
    if said is not None and groups != (1 if said < 0 else -(-width // said)):
        raise module.wrong(f"has {groups} groups in {width} columns where its scheme says a group_size of {said}")
    return width // groups, lambda start, stop: decoded(start, stop).reshape(stop - start, groups)


def _reordered(module: Module, block: int) -> tuple[int, NDArray[np.intp]] | None:
    """Where columns are assigned to groups one by one: a block of columns that share one, and the group of each."""
    stored = module.arrays.get("weight_g_idx")
    if stored is None or (stored.array == -1).all():  # -1: not reordered
        return None
    width = module.shape[1]
    found = runs(stored.array, width // block) if stored.entry.shape == (width,) else None
    if found is None:
        raise misshapen(module.name, stored, module.shape)
    return found


def _zero_points(module: Module, bits: int, block: int, args: Args | None) -> Read | None:
    """Unsigned zero points as one for each block of each row; None where the middle is everywhere."""
    stored = module.arrays.get("weight_zero_point")
    if stored is None:
        if args is not None and not args.symmetric:
            raise module.wrong("is asymmetric, and has no zero points", "download or save the model again")
        return None
    (out, width), shape = module.shape, stored.entry.shape
    if stored.entry.dtype == "I8":

        def signed(start: int, stop: int) -> Floats:
            return stored.array[start:stop].astype(np.float32) + zero_code(bits)

        own, read = _spread(module, stored, signed, args)
    elif stored.entry.dtype == "I32" and len(shape) == 2 and shape[0] == words(out, bits) and width % shape[1] == 0:
        own, read = width // shape[1], _packed_down(stored, bits)
    else:
        raise misshapen(module.name, stored, module.shape)
    reordered = _reordered(module, own)
    if reordered is not None:
        return lambda start, stop: read(start, stop)[:, reordered[1]]
    if own == block:
        return read
    if own % block:
        raise misshapen(module.name, stored, module.shape)
    return lambda start, stop: np.repeat(read(start, stop), own // block, axis=1)


def _packed_down(stored: MappedArray, bits: int) -> Read:
    """Zero points `[out, groups]`, which are packed down the columns, unlike the weights."""

    def read(start: int, stop: int) -> Floats:
        first = start // 32 * 32  # 32 codes end at a word's end, whatever their width
        packed = stored.array[first * bits // 32 : words(stop, bits)].T
        found = unpack(np.ascontiguousarray(packed), bits, stop - first)
        return found[:, start - first :].T.astype(np.float32)

    return read
