"""What a run takes of the disk, in bytes, and whether there is as much; estimates, made before anything is written.

Nothing of the size of a model goes anywhere but into the output folder (gemexport/shared/scratch.py).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ByteSize

from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import ITEM_BYTES, Tensor
from gemexport.shared.node import Node


def is_ample(folder: Path, nodes: Sequence[Node], jobs: int) -> bool:
    """Whether the disk of `folder` has room for these nodes however large their artefacts are.

    Nothing written is larger than its weights in f32, eight times what codes of 4 bits come to.
    """
    return 8 * required(nodes, jobs) <= shutil.disk_usage(folder).free


def check_room(folder: Path, nodes: Sequence[Node], jobs: int) -> None:
    """InputError where the disk of `folder` has no room for what these nodes write."""
    wanted, free = required(nodes, jobs), shutil.disk_usage(folder).free
    if wanted > free:
        problem = f"has {_told(free)} free, and this takes about {_told(wanted)}"
        raise InputError(folder, problem, "free some space, choose a folder on another disk, or ask for fewer formats")


def required(nodes: Sequence[Node], jobs: int) -> int:
    """Bytes that nodes take at most: what each leaves, and the scratch files of those that run side by side."""
    return sum(node.writes for node in nodes) + sum(sorted(node.scratch for node in nodes)[-jobs:])


def replaced(size: int, path: Path) -> tuple[int, int]:
    """What something of this size at `path` adds to the disk, and what it takes until it replaces what lies there."""
    there = lying(path)
    return max(0, size - there), min(size, there)


def artifact_bytes(tensors: Mapping[str, Tensor], variant: str) -> int:
    """What the weights of a variant come to: 4 bit and a 16-bit scale for 32 weights, or a plain dtype."""
    plain = {"bf16": 2.0, "f16": 2.0, "f32": 4.0, "q8_0": 34 / 32}.get(variant.lower())
    total = 0.0
    for tensor in tensors.values():
        own = ITEM_BYTES[tensor.dtype] if len(tensor.shape) < 2 else 18 / 32
        total += math.prod(tensor.shape) * (plain or own)
    return int(total)


def lying(path: Path) -> int:
    """Bytes of the file or folder at `path`; none where there is none."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _told(size: int) -> str:
    return ByteSize(size).human_readable(decimal=True, separator=" ")
