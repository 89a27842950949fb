"""A checkpoint, a folder in Hugging Face layout or a GGUF file: a decoder's tensors under their canonical names.

They are mapped, none read yet.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from gemexport.formats import assets, sentence_transformers
from gemexport.formats.activations import Activations
from gemexport.formats.assets import kept, reading
from gemexport.formats.assets.stops import GENERATION
from gemexport.formats.assets.stops import check as check_generation
from gemexport.formats.gemma.architecture import Architecture, TensorSpec
from gemexport.formats.gemma.embedder import MODULES
from gemexport.formats.gemma.model import Model, describe, text_config
from gemexport.formats.gemma.names import EMBEDDING, HEAD, module_of
from gemexport.formats.hub import download
from gemexport.formats.stamps import ADAPTER, NOTHING, Stamps
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import write_whole
from gemexport.formats.storage.installing import install
from gemexport.formats.storage.reading import (
    opened,
    read_json,
    read_optional_json,
    regular,
)
from gemexport.formats.storage.safetensors import FLOAT_DTYPES, MappedArray, MappedTensor, read_folder, weight_files
from gemexport.formats.tensor import ITEM_BYTES, Tensor, row_count
from gemexport.formats.unclaimed import check_unclaimed

_KEPT: list[tempfile.TemporaryDirectory] = []  # until the process ends
_SNAPSHOT = re.compile(r"/models--(?:.+?--)?(?P<name>[^/]+)/snapshots/[0-9a-f]+$")  # of huggingface_hub's cache
COMPARED_BYTES = 8 << 20  # at once, of a head that was saved beside the embedding
# Modules with `source(folder, config) -> Source`, by what config.json says the weights are quantized with.
READERS: dict[str, str] = {
    "awq": "gemexport.formats.awq",
    "compressed-tensors": "gemexport.formats.compressed_tensors",
    "gemma": "gemexport.formats.gemma_mobile",
    "gptq": "gemexport.formats.gptq",
    "mlx": "gemexport.formats.mlx",
}


Adapters = str | Path | Sequence[str | Path] | None


@dataclass(frozen=True)
class Source:
    """What a reader found in a checkpoint's files; `tensors` are exactly those of the architecture, in its order."""

    tensors: Mapping[str, Tensor]
    left_out: tuple[str, ...] = ()  # tensors of the files that the decoder does not have: towers, heads
    notes: tuple[str, ...] = ()  # what the reader could not keep, one sentence each
    activations: Activations | None = None  # static scales of activations and caches


@dataclass(frozen=True)
class Unpacked:
    """A folder with tokenizer.json and the other settings, and what is to be said about them in every format."""

    folder: Path
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A decoder and where it came from."""

    name: str
    path: Path
    config: dict[str, Any]  # config.json as it is, but for how the weights are quantized
    text_config: dict[str, Any]  # the decoder's own part of it
    model: Model
    tensors: Mapping[str, Tensor]  # exactly those of model.specs, in that order
    unpack: Callable[[], Unpacked]  # tokenizer.json and the other settings, composed when they are first wanted
    files: tuple[Path, ...] = ()  # that hold the weights, where they are not those of a folder
    left_out: tuple[str, ...] = ()  # tensors of the file that the decoder does not have: towers, heads
    notes: tuple[str, ...] = ()  # what the reader could not keep
    fallbacks: Mapping[str, Tensor] = field(default_factory=dict)  # on grids that every format holds (grids.attach)
    activations: Activations | None = None  # static scales of activations and caches, where it came with any
    adapter: str | None = None  # digests of the LoRA adapters that are merged in
    bases: Mapping[str, Tensor] = field(default_factory=dict)  # what it was added to, by the names of these tensors
    stamps: Stamps = NOTHING  # of its files and the adapter's, from before they were opened

    @property
    def architecture(self) -> Architecture:
        """What the decoder computes."""
        return self.model.decoder

    @property
    def assets(self) -> Path:
        """The folder with tokenizer.json and the other settings."""
        return self.unpack().folder

    def tokenizer_files(self) -> list[Path]:
        """Tokenizer, chat template and generation settings that came with the weights."""
        folder = self.assets
        return [folder / name for name in assets.FILES if (folder / name).is_file()]

    def nbytes(self) -> int:
        """Bytes of the decoder's tensors as stored; of a model in files of its own, bytes of these."""
        return sum(file.stat().st_size for file in self.files) if self.files else self.plain_nbytes()

    def facts(self) -> str:
        """What is another once the model is: its files' names, sizes and times, and the adapter, a line each."""
        lines = [] if self.adapter is None else [f"adapter {self.adapter}"]
        for path in self.files or [*sorted(self.path.glob("*")), *sentence_transformers.files(self.path)]:
            if path.suffix in (".safetensors", ".json", ".gguf"):
                status = path.stat()
                lines.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
        return "".join(f"{line}\n" for line in lines)

    def plain_nbytes(self) -> int:
        """Bytes of the decoder's tensors in their dtypes, without codes: what an exporter's progress counts."""
        return sum(math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype] for tensor in self.tensors.values())


def open_checkpoint(path: str | Path, scratch: Path | None = None, *, adapter: Adapters = ()) -> Checkpoint:
    """The checkpoint in the folder or the GGUF file `path`; reads headers only.

    With `adapter`, folders of LoRA adapters of peft, its tensors are merged with these in order as they are read. What
    a file has instead of tokenizer.json is unpacked into a folder in `scratch`, once, or into a temporary one that is
    gone when the process ends. Raises InputError for what is missing, truncated, contradictory or not known.
    """
    folders = adapter_folders(adapter)
    stamps = Stamps.of(Path(path), *folders)
    found = _open(Path(path), scratch)
    for folder in folders:
        found = import_module("gemexport.formats.lora").adapted(found, folder, scratch)
    return replace(found, stamps=stamps)


def adapter_folders(given: Adapters) -> tuple[Path, ...]:
    """The folders of adapters in the order in which they are merged: one, several or none."""
    if given is None:
        return ()
    return (Path(given),) if isinstance(given, str | Path) else tuple(map(Path, given))


def _open(path: Path, scratch: Path | None) -> Checkpoint:
    """The checkpoint in the folder or the file `path`, by itself."""
    if path.is_dir():
        return _folder(path, scratch)
    if is_gguf(path):
        return _gguf(path, scratch)
    usual = "give the folder of a checkpoint in Hugging Face layout, or a .gguf file"
    if not path.exists():
        raise InputError(path, "there is no such file or folder", download(path) or usual)
    regular(path)
    raise InputError(path, "is a file of no format that is known", usual)


def is_gguf(path: Path) -> bool:
    """Whether this is a GGUF file, by its name or its first bytes."""
    if path.suffix.lower() == ".gguf":
        return path.is_file()
    try:
        with opened(path) as file:
            return file.read(4) == b"GGUF"
    except (OSError, InputError):
        return False


def checkpoint_name(path: Path) -> str:
    """What a checkpoint is called: its folder, or its file without the ending and the number of a part."""
    path = Path(os.path.abspath(path))  # links stay: the Hub's cache has hashes behind them
    if (match := _SNAPSHOT.search(path.as_posix())) and path.is_dir():
        return match["name"]
    return path.name if path.is_dir() else re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", path.name, flags=re.IGNORECASE)


def _gguf(path: Path, scratch: Path | None) -> Checkpoint:
    """The checkpoint in a GGUF file."""
    try:
        reader = import_module("gemexport.formats.gguf.model")
    except ModuleNotFoundError as error:
        problem = f"is GGUF, which needs {error.name}"
        raise InputError(path, problem, install("llama")) from error
    found: Checkpoint = reader.checkpoint(path, scratch)
    return found


def _folder(folder: Path, scratch: Path | None) -> Checkpoint:
    """The checkpoint in a folder in Hugging Face layout."""
    config = read_config(folder)
    model = describe(config, folder / "config.json")
    if not (folder / "tokenizer.json").is_file():
        remedy = "save the tokenizer there (AutoTokenizer.from_pretrained(…).save_pretrained(…))"
        raise InputError(folder, "there is no tokenizer.json", remedy)
    for name in assets.FILES:
        if os.path.lexists(folder / name):
            regular(folder / name, reading.BYTES)
    check_generation(folder / GENERATION, read_optional_json(folder / GENERATION))
    found = _source(folder, config, model)
    check_unclaimed(folder, found.left_out, model.specs)
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "quantization")}
    return Checkpoint(
        name=checkpoint_name(folder),
        path=folder,
        config=plain,
        text_config=text_config(plain, folder / "config.json"),
        model=model,
        tensors=found.tensors,
        unpack=_composing(folder, model, scratch),
        left_out=found.left_out,
        notes=found.notes,
        activations=found.activations,
    )


def _composing(folder: Path, model: Model, scratch: Path | None) -> Callable[[], Unpacked]:
    """A function that judges and composes the settings in `folder` once, for all that ask with the same `scratch`."""
    decoder = asked_of_tokens(model)

    def fill(target: Path) -> None:
        read = [*weight_files(folder), *sentence_transformers.entries(folder)]
        assets.write(kept.composed(folder, decoder, read), folder, target)

    return unpacking(fill, lambda: assets.mark(folder, decoder), scratch, folder)


def asked_of_tokens(model: Model) -> assets.Decoder:
    """What a model says of its tokens, which its tokenizer's settings are held to."""
    decoder = model.decoder
    return assets.Decoder(decoder.vocab_size, decoder.eos_token_ids, decoder.bos_token_id, decoder.pad_token_id)


def unpacking(
    fill: Callable[[Path], None], mark: Callable[[], str], scratch: Path | None, own: Path | None = None
) -> Callable[[], Unpacked]:
    """A function that lets `fill` write settings into a folder once, and tells where they are.

    The folder is called `mark()` and lies in `scratch`, where other processes find it; without one it is gone when this
    process ends. Where nothing but notes was written, the files are those in the folder `own`.
    """

    @cache
    def unpack() -> Unpacked:
        if scratch is None:
            _KEPT.append(tempfile.TemporaryDirectory(prefix="gemexport-"))
            made = Path(_KEPT[-1].name)
            fill(made)
        else:
            made = scratch / mark()
            if not made.is_dir():
                write_whole(made, fill)
        notes = made / assets.NOTES
        said = json.loads(notes.read_text("ascii")) if notes.is_file() else ()
        return Unpacked(made if own is None or (made / assets.TOKENIZER).is_file() else own, tuple(said))

    return unpack


def _source(folder: Path, config: dict[str, Any], model: Model) -> Source:
    """The tensors of a folder, by the reader for the way in which they are quantized."""
    method = quantization_method(config)
    if method is None:
        return _plain(folder, model)
    if method not in READERS:
        problem = f"the weights are quantized in a way that is not known here ({method})"
        raise InputError(folder / "config.json", problem, "give the bf16 checkpoint it was made from")
    found: Source = import_module(READERS[method]).source(folder, config)
    return found


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """How config.json says that the weights are quantized: its `quant_method`, or `mlx`; None when they are not."""
    if isinstance(config.get("quantization_config"), dict):
        # mlx-lm writes its own `quantization` there a second time, for other tools.
        method = config["quantization_config"].get("quant_method")
        return str(method) if method or "quantization" not in config else "mlx"
    return "mlx" if isinstance(config.get("quantization"), dict) else None


def _plain(folder: Path, model: Model) -> Source:
    """Tensors that are stored as floats."""
    stored = stored_arrays(folder, model)
    check_head(folder, model, stored)
    tensors: dict[str, Tensor] = {}
    for spec in model.specs.values():
        tensors[spec.name] = plain_tensor(folder, spec, stored.pop(spec.name, None))
    return Source(tensors, left_out=tuple(sorted(stored)))


def stored_arrays(folder: Path, model: Model) -> dict[str, MappedArray]:
    """What the files of a checkpoint hold, by canonical name.

    Raises InputError for two arrays that are one tensor of the decoder under two names, and differ.
    """
    found: dict[str, MappedArray] = {}
    remedy = "take out the one that is not the model's"
    beside = sentence_transformers.arrays(folder)
    for name, array in (*read_folder(folder).items(), *beside):
        canonical = model.family.canonical_name(name)
        other = found.setdefault(canonical, array)
        if other is not array and not _same_bytes(other, array):
            problem = f"holds {canonical} twice, as {other.entry.name} and as {name}, which differ"
            raise InputError(array.path, problem, remedy)
    return found


def check_head(folder: Path, model: Model, stored: Mapping[str, MappedArray]) -> None:
    """Raise InputError for a head of its own where config.json says that it is the embedding table.

    A head that was saved with the model all the same is a copy, byte for byte; one that was trained, or quantized in
    another way, is not, and transformers and mlx-lm would compute with it. `stored` is by canonical name.
    """
    if not model.decoder.tied:
        return
    for name, array in stored.items():
        head, _, key = name.rpartition(".")
        if head == module_of(HEAD) and len(array.entry.shape) == 2:
            table = stored.get(f"{module_of(EMBEDDING)}.{key}")
            if table is None or not _same_bytes(array, table):
                problem = "says that the head is tied to the embedding, but the model has a head of its own"
                raise InputError(folder / "config.json", problem, "set tie_word_embeddings to false")


def _same_bytes(one: MappedArray, other: MappedArray) -> bool:
    """Whether two matrices are stored alike."""
    if (one.entry.dtype, one.entry.shape) != (other.entry.dtype, other.entry.shape):
        return False
    rows = row_count(one.entry.shape)
    step = max(1, COMPARED_BYTES * rows // max(one.entry.nbytes, 1))
    return all(
        one.read(start, start + step).tobytes() == other.read(start, start + step).tobytes()
        for start in range(0, rows, step)
    )


def plain_tensor(folder: Path, spec: TensorSpec, array: MappedArray | None) -> Tensor:
    """A tensor that is stored as floats; InputError when it is missing, or is no tensor of that shape."""
    name, shape = spec.name, spec.shape
    if array is None:
        raise InputError(folder, f"the tensor {name} is missing", "save the whole model, or mend config.json")
    if array.entry.dtype not in FLOAT_DTYPES:
        remedy = "give the model in bf16, f16 or f32"
        raise InputError(array.path, f"tensor {name} is stored as {array.entry.dtype}", remedy)
    if array.entry.shape != shape and not (shape == (1,) and array.entry.shape == ()):
        found, wanted = list(array.entry.shape), list(shape)
        problem = f"tensor {name} has the shape {found} where config.json says {wanted}"
        raise InputError(array.path, problem, "use the config.json that came with the model")
    return MappedTensor(array, name, shape)


def made_by_mlx(adapter: Mapping[str, Any]) -> bool:
    """Whether mlx-lm wrote this adapter_config.json."""
    return "peft_type" not in adapter and ("lora_parameters" in adapter or "fine_tune_type" in adapter)


def fuse_remedy(folder: Path) -> str:
    """What makes a model of an adapter of mlx-lm."""
    return f"merge it with mlx_lm.fuse --model BASE --adapter-path {folder} --save-path MERGED, and give MERGED"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; InputError when it is missing or is not a JSON object."""
    path = folder / "config.json"
    remedy = "give the folder of a checkpoint in Hugging Face layout"
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        if (folder / ADAPTER).is_file():
            settings = read_json(folder / ADAPTER)
            if made_by_mlx(settings):
                raise InputError(folder, "is an adapter of mlx-lm, not a model", fuse_remedy(folder)) from error
            base = settings.get("base_model_name_or_path")
            remedy = f"give the model it was made for ({base or 'its base'}), and --adapter {folder}"
            raise InputError(folder, "is an adapter, not a model", remedy) from error
        raise InputError(folder, "there is no config.json", remedy) from error
    if (modules := sentence_transformers.described(folder)) is not None:
        config[MODULES] = modules
    inner = config.get("text_config")
    if isinstance(inner, dict) and isinstance(inner.get("quantization_config"), dict):
        # transformers and mlx-lm look there as well.
        settings = inner.pop("quantization_config")
        config["quantization_config"] = config.get("quantization_config") or settings
    return config
