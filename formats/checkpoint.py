"""A checkpoint in Hugging Face layout: a decoder's tensors under their canonical names, mapped, none read yet."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from gemexport.formats.activations import Activations
from gemexport.formats.architecture import Architecture, architecture, text_config
from gemexport.formats.errors import InputError
from gemexport.formats.safetensors import FLOAT_DTYPES, MappedTensor, read_folder
from gemexport.formats.tensor import Tensor

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "generation_config.json",
)
# Modules with `source(folder, config) -> Source`, by what config.json says the weights are quantized with.
READERS: dict[str, str] = {"gemma": "gemexport.formats.gemma_mobile"}
# The same decoder under the names of transformers' classes: alone, inside a multimodal model of today and of before.
_SPELLINGS = (
    (re.compile(r"^model\.language_model\.(.+)$"), r"model.\1"),
    (re.compile(r"^language_model\.model\.(.+)$"), r"model.\1"),
    (re.compile(r"^language_model\.(lm_head\..+)$"), r"\1"),
    (re.compile(r"^((?:layers|embed_tokens|embed_tokens_per_layer|norm|per_layer_\w+)\..+)$"), r"model.\1"),
)


@dataclass(frozen=True)
class Source:
    """What a reader found in a checkpoint's files; `tensors` are exactly those of the architecture, in its order."""

    tensors: Mapping[str, Tensor]
    left_out: tuple[str, ...] = ()  # tensors of the files that the decoder does not have: towers, heads
    notes: tuple[str, ...] = ()  # what the reader could not keep, one sentence each
    activations: Activations | None = None  # static scales of activations and caches


@dataclass(frozen=True)
class Checkpoint:
    """A decoder and where it came from."""

    name: str
    path: Path
    config: dict[str, Any]  # config.json as it is, but for how the weights are quantized
    text_config: dict[str, Any]  # the decoder's own part of it
    architecture: Architecture
    tensors: Mapping[str, Tensor]  # exactly architecture.tensor_shapes(), in that order
    assets: Path  # the folder with tokenizer.json and the other settings
    left_out: tuple[str, ...] = ()  # tensors of the file that the decoder does not have: towers, heads
    notes: tuple[str, ...] = ()  # what the reader could not keep
    fallbacks: Mapping[str, Tensor] = field(default_factory=dict)  # on grids that every format holds (grids.attach)
    activations: Activations | None = None  # static scales of activations and caches, where it came with any

    def tokenizer_files(self) -> list[Path]:
        """Tokenizer, chat template and generation settings that came with the weights."""
        return [self.assets / name for name in TOKENIZER_FILES if (self.assets / name).is_file()]

    def nbytes(self) -> int:
        """Bytes of the decoder's tensors as stored."""
        sizes = {"bf16": 2, "f16": 2, "f32": 4}
        total = 0
        for tensor in self.tensors.values():
            count = 1
            for size in tensor.shape:
                count *= size
            total += count * sizes[tensor.dtype]
        return total


def canonical_name(name: str) -> str:
    """The name that transformers' text model gives to a tensor of any of the classes that contain it."""
    for pattern, replacement in _SPELLINGS:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    return name


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in folder `path`; reads headers only.

    Raises InputError for what is missing, truncated, contradictory or not known.
    """
    folder = Path(path)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "there is no such folder"
        raise InputError(folder, problem, "give the folder of a checkpoint in Hugging Face layout")
    config = read_config(folder)
    decoder = architecture(config, folder / "config.json")
    if not (folder / "tokenizer.json").is_file():
        remedy = "save the tokenizer there (AutoTokenizer.from_pretrained(…).save_pretrained(…))"
        raise InputError(folder, "there is no tokenizer.json", remedy)
    read_tokenizer(folder / "tokenizer.json")
    found = _source(folder, config, decoder)
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "quantization")}
    return Checkpoint(
        name=folder.resolve().name,
        path=folder,
        config=plain,
        text_config=text_config(plain, folder / "config.json"),
        architecture=decoder,
        tensors=found.tensors,
        assets=folder,
        left_out=found.left_out,
        notes=found.notes,
        activations=found.activations,
    )


def _source(folder: Path, config: dict[str, Any], decoder: Architecture) -> Source:
    """The tensors of a folder, by the reader for the way in which they are quantized."""
    method = quantization_method(config)
    if method is None:
        return _plain(folder, decoder)
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


def _plain(folder: Path, decoder: Architecture) -> Source:
    """Tensors that are stored as floats."""
    stored = {canonical_name(name): array for name, array in read_folder(folder).items()}
    tensors: dict[str, Tensor] = {}
    for name, shape in decoder.tensor_shapes().items():
        array = stored.pop(name, None)
        if array is None:
            raise InputError(folder, f"the tensor {name} is missing", "save the whole model, or mend config.json")
        if array.entry.dtype not in FLOAT_DTYPES:
            remedy = "give the model in bf16, f16 or f32"
            raise InputError(array.path, f"tensor {name} is stored as {array.entry.dtype}", remedy)
        if array.entry.shape != shape and not (shape == (1,) and array.entry.shape == ()):
            found, wanted = list(array.entry.shape), list(shape)
            problem = f"tensor {name} has the shape {found} where config.json says {wanted}"
            raise InputError(array.path, problem, "use the config.json that came with the model")
        tensors[name] = MappedTensor(array, name)
    return Source(tensors, left_out=tuple(sorted(stored)))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; InputError when it is missing or is not a JSON object."""
    path = folder / "config.json"
    remedy = "give the folder of a checkpoint in Hugging Face layout"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(folder, "there is no config.json", remedy) from error
    except (ValueError, OSError) as error:
        raise InputError(path, f"cannot be read as JSON ({error})", "download or save the file again") from error
    if not isinstance(config, dict):
        raise InputError(path, "is not a JSON object", "download or save the file again")
    return config


def read_tokenizer(path: Path) -> dict[str, Any]:
    """tokenizer.json as a dictionary; InputError when it is not one."""
    try:
        # 33 MB of JSON: pydantic's parser takes half as long as Python's.
        tokenizer = from_json(path.read_bytes())
        tokenizer["model"]["vocab"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(path, "is not a tokenizer of the tokenizers library", "save the tokenizer again") from error
    return dict(tokenizer)
