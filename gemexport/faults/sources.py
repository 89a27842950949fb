"""The models that faults are tried on, which differ in what their weights lie on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gemexport import demo
from gemexport.demo import FamilyName
from gemexport.formats.gemma.names import CANONICAL, canonical_name
from gemexport.formats.gemma.roles import Role
from gemexport.formats.storage.safetensors import Writer, read_file

WEIGHTS = "model.safetensors"
OFF = (Role.UP, Role.DOWN, Role.O)  # of a layer: on no lattice in one that is there in part, as after a fine-tune


def lattice(folder: Path, family: FamilyName = "gemma4") -> Path:
    """Every matrix lies on a lattice, as after quantization-aware training."""
    return demo.make(folder, family=family, size="tiny")


def plain(folder: Path, family: FamilyName = "gemma4") -> Path:
    """No matrix lies on one, which is what a fine-tune is."""
    return demo.make(folder, family=family, size="tiny", rule=None)


def partly(folder: Path, family: FamilyName = "gemma4") -> Path:
    """Some matrices of every second layer have left the lattice."""
    lattice(folder, family)
    file = folder / WEIGHTS
    arrays = {name: (item.entry, np.array(item.array)) for name, item in read_file(file).items()}
    layers = range(0, len(arrays), 2)
    moved = {CANONICAL.name(role, layer) for role in OFF for layer in layers}
    with tempfile.TemporaryDirectory() as beside:
        other = read_file(plain(Path(beside) / "plain", family) / WEIGHTS)
        for name, (entry, _) in arrays.items():
            if canonical_name(name) in moved:
                arrays[name] = entry, np.array(other[name].array)
    writer = Writer(file, [entry for entry, _ in arrays.values()], {"format": "pt"})
    for entry, array in arrays.values():
        writer.write(entry.name, array)
    writer.close()
    return folder


def mobile(folder: Path, family: FamilyName = "gemma4") -> Path:
    """Grids of 2, 4 and 8 bits with a scale a row, and static scales of activations; always a Gemma 4."""
    from gemexport.demo import mobile as demo_mobile

    return demo_mobile.make(folder, size="tiny")


SOURCES: dict[str, Callable[[Path, FamilyName], Path]] = {
    "lattice": lattice,
    "plain": plain,
    "partly": partly,
    "mobile": mobile,
}
