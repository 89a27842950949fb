"""Small files of every kind that is read, ways to damage them, and what must come of it: a model or an InputError.

`benchmarks/fuzz.py` damages for minutes with a random generator, the tests for seconds with Hypothesis's.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemexport import demo
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.grids.recipe import RECIPES
from gemexport.formats.grids.search import attach, find_grids
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import slices

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SMALL = demo.Size(vocab=512, hidden=32, intermediate=32, heads=1, kv_heads=1, head_dim=32, per_layer=32, window=8)
EXTREMES = (0, 1, 2, 7, 8, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
# What a JSON file may say instead of what it should.
ODDITIES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 5, 16, 33, 0.5, -1e9, 1e300, 1 << 31, 1 << 63, 1 << 70, "", "x", "re:(", "re:.*",
    "group", "channel", "tensor", "float", "int", "U8", "I32", "F8_E4M3", "F64", "é\ud800", [], {}, [[]], {"x": {}},
)  # fmt: skip
ENDINGS = (".safetensors", ".json", ".gguf", ".dat")
TIME_LIMIT = 20  # seconds for one file of some 100 kB
MEMORY_LIMIT = 1 << 30  # bytes of address space that reading one may add


@dataclass(frozen=True)
class Sample:
    """A whole file or folder, and what reads it and whatever a run reads of it."""

    path: Path
    read: Callable[[Path, Path], None]  # with a scratch folder

    def files(self, path: Path) -> list[Path]:
        """The files of a copy at `path` that the reader vouches for: not the tokenizer's, which others read."""
        if path.is_file():
            return [path]
        return [file for file in sorted(path.iterdir()) if file.suffix in ENDINGS and "token" not in file.name]


def read_model(model: Path, scratch: Path, adapter: Path | None = None) -> None:
    """Everything that a run reads of a checkpoint: config, every tensor, the tokenizer where it was unpacked."""
    from tokenizers import Tokenizer

    checkpoint = open_checkpoint(model, scratch, adapter=adapter)
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) == 2:
            for start, stop in slices(tensor):
                tensor.rows(start, stop)
        else:
            tensor.numpy()
    if model.is_file():  # the one that came with a folder is not ours to vouch for
        Tokenizer.from_file(str(checkpoint.assets / "tokenizer.json")).encode("Café <eos>  two\n\n")


def read_importances(path: Path, _: Path) -> None:
    """An importance matrix."""
    from gemexport.formats.gguf.imatrix import read_imatrix

    read_imatrix(path)


def plain(folder: Path, family: demo.FamilyName = "gemma3") -> Path:
    """A tiny model in bf16."""
    return demo.make(folder / "plain", family=family, size=SMALL)


def gguf(folder: Path, family: demo.FamilyName) -> Path:
    """A GGUF file of a tiny model."""
    from gemexport.exporters import gguf as exporter

    checkpoint = open_checkpoint(plain(folder, family))
    find_grids(checkpoint, folder / "grids", RECIPES["default"])
    return exporter.export(attach(checkpoint, folder / "grids"), folder / f"{family}.gguf").path


def mlx(folder: Path) -> Path:
    """An MLX folder of a tiny model."""
    from gemexport.exporters import mlx as exporter

    checkpoint = open_checkpoint(plain(folder))
    find_grids(checkpoint, folder / "grids", RECIPES["default"])
    return exporter.export(attach(checkpoint, folder / "grids"), folder / "mlx").path


def mobile(folder: Path) -> Path:
    """A tiny model in the format of Gemma's mobile releases; needs torch and transformers."""
    from gemexport.demo import mobile as demo_mobile

    return demo_mobile.make(folder / "mobile", size="tiny")


def golden(folder: Path, *names: str) -> list[Sample]:
    """Checkpoints that other libraries wrote, each with a tokenizer beside it."""
    tokenizer = plain(folder) / "tokenizer.json"
    models = [Path(shutil.copytree(GOLDEN / name, folder / name)) for name in names]
    for model in models:
        (model / "values.json").unlink(missing_ok=True)
        shutil.copyfile(tokenizer, model / "tokenizer.json")
    return [Sample(model, read_model) for model in models]


def lora(folder: Path) -> list[Sample]:
    """An adapter beside the base that it was made for."""
    base = demo.make(folder / "base", family="gemma3", size="tiny", rule="max/7.5")
    adapter = Path(shutil.copytree(GOLDEN / "lora", folder / "lora"))
    (adapter / "merged.safetensors").unlink()
    return [Sample(adapter, lambda path, scratch: read_model(base, scratch, path))]


def imatrix(folder: Path) -> list[Sample]:
    """An importance matrix in each of its layouts."""
    from gemexport.formats.gguf.container import Writer, string, uint32

    values = np.float32([2, 4, 6.5, 8])
    arrays = {"blk.0.attn_q.weight.in_sum2": values[None], "blk.0.attn_q.weight.counts": np.float32([[4]])}
    facts = {"general.type": string("imatrix"), "imatrix.chunk_count": uint32(7), "imatrix.chunk_size": uint32(512)}
    new, old = folder / "imatrix.gguf", folder / "imatrix.dat"
    with Writer(new, facts, {name: array.shape for name, array in arrays.items()}) as out:
        for name, array in arrays.items():
            out.write(name, _f32(), array)
    name = b"blk.0.attn_q.weight"
    head = struct.pack(f"<ii{len(name)}sii", 1, len(name), name, 4, values.size)
    old.write_bytes(head + values.tobytes() + struct.pack("<ii4s", 9, 4, b"text"))
    return [Sample(new, read_importances), Sample(old, read_importances)]


def _f32() -> Any:
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType.F32


# By name of the reader: makes what it is tried on. Another reader is another line.
READERS: dict[str, Callable[[Path], list[Sample]]] = {
    "awq": lambda folder: golden(folder, "awq"),
    "compressed-tensors": lambda folder: golden(
        folder, "llm-compressor-w4a16", "llm-compressor-w4a16-asym", "llm-compressor-w8a8-static"
    ),
    "gguf": lambda folder: [Sample(gguf(folder / family, family), read_model) for family in ("gemma3", "gemma4")],
    "gptq": lambda folder: golden(folder, "gptq", "gptq-v2", "gptq-desc-act"),
    "imatrix": imatrix,
    "lora": lora,
    "mlx": lambda folder: [Sample(mlx(folder), read_model)],
    "mobile": lambda folder: [Sample(mobile(folder), read_model)],
    "safetensors": lambda folder: [Sample(plain(folder), read_model)],
}


def damaged(sample: Sample, folder: Path, choose: random.Random) -> tuple[Path, str]:
    """A copy of a sample in `folder`, which is made anew, with one file damaged; and what was done to it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy = folder / sample.path.name
    (shutil.copytree if sample.path.is_dir() else shutil.copyfile)(sample.path, copy)
    file = choose.choice(sample.files(copy))
    done = [damage(file, choose) for _ in range(choose.randint(1, 3))]
    return copy, f"{file.name}: {', '.join(done)}"


def damage(file: Path, choose: random.Random) -> str:
    """Damage a file: what its JSON says, where it has any, or any of its bytes; returns what was done."""
    data = file.read_bytes()
    if file.suffix in (".json", ".safetensors") and choose.random() < 0.6:
        start = 8 if file.suffix == ".safetensors" else 0
        stop = start + int.from_bytes(data[:8], "little") if start else len(data)
        try:
            content = json.loads(data[start:stop])
        except ValueError:  # damaged before
            content = None
        if isinstance(content, dict) and content:
            done = lie(content, choose)
            text = json.dumps(content).encode()
            file.write_bytes((len(text).to_bytes(8, "little") if start else b"") + text + data[stop:])
            return done
    changed = bytearray(data)
    done = mutate(changed, choose) if changed else "empty"
    file.write_bytes(changed)
    return done


def lie(content: dict[str, Any], choose: random.Random) -> str:
    """Replace, remove, rename or swap something anywhere in a JSON object, in place; returns what was done."""
    place: Any = content
    path: list[Any] = []
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = choose.choice(keys)
        path.append(key)
        if not (isinstance(place[key], dict | list) and place[key]) or choose.random() < 0.15:
            break
        place = place[key]
    kind = choose.choice(("replace", "replace", "number", "remove", "rename", "swap"))
    if kind == "replace":
        place[key] = choose.choice(ODDITIES)
    elif kind == "number" and isinstance(place[key], int):
        place[key] = int(place[key]) + choose.choice((-1, 1, 8, -32, 1 << 20))
    elif kind == "remove":
        del place[key]
    elif kind == "rename" and isinstance(place, dict):
        place[str(key)[:-1]] = place.pop(key)
    else:
        other = choose.choice(keys)
        place[key], place[other] = place[other], place[key]
    return f"{kind} {'/'.join(map(str, path))}"


def mutate(data: bytearray, choose: random.Random) -> str:
    """Damage bytes in place; returns what was done."""
    kind = choose.choice(("bytes", "number", "number", "cut", "double", "end"))
    # Headers are at the front, and short: half of the damage goes there.
    place = choose.randrange(min(len(data), 4096) if choose.random() < 0.5 else len(data))
    if kind == "bytes":
        for _ in range(choose.randint(1, 8)):
            data[min(len(data) - 1, place + choose.randrange(64))] = choose.randrange(256)
    elif kind == "number":
        size = choose.choice((1, 2, 4, 8))
        value = choose.choice(EXTREMES) & ((1 << 8 * size) - 1)
        data[place : place + size] = value.to_bytes(size, "little")
    elif kind == "cut":
        del data[place : place + choose.randint(1, 64)]
    elif kind == "double":
        data[place:place] = data[place : place + choose.randint(1, 64)]
    else:
        del data[place:]
    return f"{kind} at {place}"


def complaint(sample: Sample, path: Path) -> str:
    """What an InputError says of a damaged copy at `path`; nothing when it can be read.

    Whatever else is raised goes through, as do a reader that takes too long or too much memory, and a message of more
    than one line.
    """
    scratch = path.parent / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # infinite scales times zero
            sample.read(path, scratch)
    except InputError as error:
        if "\n" in str(error):
            raise ValueError(f"more than one line: {error}") from error
        return str(error)
    return ""


@contextmanager
def limited() -> Iterator[None]:
    """Raise TimeoutError when the block takes longer than TIME_LIMIT, and MemoryError past MEMORY_LIMIT (on Linux)."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took longer than {TIME_LIMIT} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_LIMIT, before[1]))
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(TIME_LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)
