"""The tables of angles in graphs of fixed size, whole: logits show the rows of positions that were tried, no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.gemma.architecture import Architecture
from gemexport.shared.measured import FactReport

# Of a cosine: libraries differ in its last bit, and round an angle of thousands, 2^-14 apart in f32, either way. A
# table of our angles, products in f32, and not of exact ones, where the two can be told apart, is so throughout.
NEAR = 1e-6
PER_POSITION = 2.0**-23
OURS = 0.5
KINDS: dict[str, Any] = {"cos": np.cos, "sin": np.sin}
SLICE = 4096  # positions at a time
Key = tuple[int, str]  # which of the rotations, in the order of the layers; cos or sin
Table = tuple[tuple[int, ...], Callable[[int, int], NDArray[Any]]]  # its shape, and its rows


def table_differences(target: str, path: Path, decoder: Architecture) -> tuple[FactReport, ...]:
    """Every table of cosines or sines that is not the decoder's, with the first position at which it is not."""
    stored = {"onnx": _onnx, "coreml": _core_ml}.get(target)
    return () if stored is None else tuple(_compared(stored(path), decoder))


def _compared(stored: dict[Key, Table], decoder: Architecture) -> Iterator[FactReport]:
    ropes = list(dict.fromkeys((layer.rope, layer.head_dim) for layer in decoder.layers))
    for number, (rope, head_dim) in enumerate(ropes):
        frequencies = rope.inv_freq(head_dim).astype(np.float32)
        for kind, function in KINDS.items():
            shape, rows = stored.get((number, kind), ((), None))
            if rows is None or shape[1:] != frequencies.shape:
                continue  # made in another way, or by somebody else
            for start in range(0, shape[0], SLICE):
                found = rows(start, min(start + SLICE, shape[0]))
                positions = np.arange(start, start + len(found), dtype=np.float32)[:, None]
                wanted = function(positions * frequencies)
                off = np.abs(found - wanted)
                exact = function(positions.astype(np.float64) * frequencies)
                apart = np.abs(exact - wanted) > NEAR / 2
                ours = not apart.any() or np.mean((off < np.abs(found - exact))[apart]) > OURS
                room = 0.0 if ours else PER_POSITION * positions
                wrong = np.argwhere(~(off <= NEAR + room))
                if len(wrong):
                    at, column = (int(index) for index in wrong[0])
                    name = f"the {kind} of RoPE {number} at position {start + at}"
                    said, own = (f"{table[at, column]:.7g}" for table in (found, wanted))
                    yield FactReport(name=name, found=said, expected=own)
                    break


def _key(name: str, between: str) -> Key:
    number, _, kind = name.rpartition("rope_")[2].partition(between)
    return (int(number), kind) if number.isdecimal() and kind in KINDS else (-1, "")


def _onnx(path: Path) -> dict[Key, Table]:
    from gemexport.formats.onnx import graph_files, read_model
    from gemexport.formats.onnx.stored import array

    found: dict[Key, Table] = {}
    for file in graph_files(path):
        for name, value in read_model(file).graph.initializers.items():
            if (key := _key(name, "/"))[1]:
                table = array(value, file)
                found[key] = table.shape, lambda start, stop, table=table: table[start:stop]  # type: ignore[misc]
    return found


def _core_ml(path: Path) -> dict[Key, Table]:
    from gemexport.formats.coreml import constants
    from gemexport.formats.coreml.package import open_package

    found: dict[Key, Table] = {}
    for name, table in constants(open_package(path)).items():
        if (key := _key(name, "_"))[1] and not isinstance(table, str | list):
            found[key] = table.shape, table.rows
    return found
