"""The models that faults are tried on, which differ in what their weights lie on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from gemexport import demo
from gemexport.demo import FamilyName
from gemexport.formats.gemma.names import CANONICAL, canonical_name
from gemexport.formats.gemma.roles import Role
from gemexport.formats.storage.safetensors import Writer, read_file

WEIGHTS = "model.safetensors"
# Of a layer: on no lattice in one that is there in part, as after a fine-tune.
OFF = (Role.UP, Role.DOWN, Role.O, Role.EXPERT_DOWN)

Source = Literal["lattice", "plain", "partly", "mobile"]


class Make(Protocol):
    """Makes a small model, with experts in every layer if asked; returns its folder."""

    def __call__(self, folder: Path, family: FamilyName = "gemma4", experts: bool = False) -> Path: ...


def lattice(folder: Path, family: FamilyName = "gemma4", experts: bool = False) -> Path:
    """Every matrix lies on a lattice, as after quantization-aware training."""
    return demo.make(folder, family=family, size="tiny", experts=experts)


def plain(folder: Path, family: FamilyName = "gemma4", experts: bool = False) -> Path:
    """No matrix lies on one, which is what a fine-tune is."""
    return demo.make(folder, family=family, size="tiny", rule=None, experts=experts)


def partly(folder: Path, family: FamilyName = "gemma4", experts: bool = False) -> Path:
    """Some matrices of every second layer have left the lattice."""
    lattice(folder, family, experts)
    file = folder / WEIGHTS
    arrays = {name: (item.entry, np.array(item.array)) for name, item in read_file(file).items()}
    layers = range(0, len(arrays), 2)
    moved = {CANONICAL.name(role, layer) for role in OFF for layer in layers}
    with tempfile.TemporaryDirectory() as beside:
        other = read_file(plain(Path(beside) / "plain", family, experts) / WEIGHTS)
        for name, (entry, _) in arrays.items():
            if canonical_name(name) in moved:
                arrays[name] = entry, np.array(other[name].array)
    writer = Writer(file, [entry for entry, _ in arrays.values()], {"format": "pt"})
    for entry, array in arrays.values():
        writer.write(entry.name, array)
    writer.close()
    return folder


def mobile(folder: Path, family: FamilyName = "gemma4", experts: bool = False) -> Path:
    """Grids of 2, 4 and 8 bits with a scale a row, and static scales of activations; always a Gemma 4 without experts.

    ValueError for one with experts.
    """
    if experts:
        raise ValueError("no mobile checkpoint has experts")
    from gemexport.demo import mobile as demo_mobile

    return demo_mobile.make(folder, size="tiny")


SOURCES: dict[Source, Make] = {
    "lattice": lattice,
    "plain": plain,
    "partly": partly,
    "mobile": mobile,
}
