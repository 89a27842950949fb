"""Runs a compressed-tensors folder in transformers a layer at a time, where all of it in f32 has no room.

The package of that name unpacks each matrix, some rows at a time, and transformers' modules compute with it in f32.
What loading all at once does besides (`from_pretrained`), and the key/value cache, are not tried.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from gemexport.formats.compressed_tensors.activations import activations
from gemexport.formats.gemma.model import text_config
from gemexport.formats.modules import Module, read_source
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import MappedArray
from gemexport.formats.tensor import DType, Floats, Rows, TensorBase
from gemexport.validators.reference import reference
from gemexport.validators.reference.decoder import config_of, quiet
from gemexport.validators.runtimes.protocol import Arithmetic, Laps

DTYPES = {
    "I32": torch.int32, "I64": torch.int64, "I8": torch.int8, "U8": torch.uint8, "F32": torch.float32,
    "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
BY_ROWS = ("weight_packed", "weight", "weight_scale")  # whose first axis is the matrix's, where it is as long


class Layerwise:
    """A folder whose layers are unpacked one after the other."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], threads: int, wide: Callable[[], AbstractContextManager[None]]
    ) -> None:
        text = text_config(dict(config), folder)
        schemes = _schemes(text, config)
        rounded = activations(folder)

        def read(module: Module) -> Unpacked | None:
            scheme = schemes(module.stem)
            return None if scheme is None or "weight_scale" not in module.arrays else Unpacked(module, scheme, wide)

        tensors = read_source(folder, dict(config), read).tensors
        self._reference = reference(text, dict(tensors), threads, activations=rounded)
        self.name = f"transformers {transformers.__version__} (compressed-tensors, set to f32, a layer at a time)"
        self.arithmetic: Arithmetic = "static-activations" if rounded else "f32"
        self.laps = Laps()

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Teacher-forced logits `[len(tokens), vocab]`."""
        with self.laps.lap(len(tokens)):
            return self._reference.logits(tokens)

    def together(self, sequences: Sequence[Sequence[int]]) -> Iterator[Floats]:
        """The same of several, mapped: a layer is unpacked once for all of them."""
        with tempfile.TemporaryDirectory(prefix="gemexport-") as folder:
            paths = [Path(folder) / f"{number}.npy" for number in range(len(sequences))]
            with self.laps.lap(sum(map(len, sequences))):
                self._reference.write_logits(sequences, paths)
            for path in paths:
                found: Floats = np.load(path, mmap_mode="r")
                yield found

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """Nothing: each token would take all layers anew, and there is no cache to try."""
        return []

    def hidden(self, tokens: Sequence[int]) -> list[Floats]:
        """What goes into the first layer and what each layer gives, `[layers + 1][n, hidden]`."""
        return list(self._reference.hidden(tokens))

    def close(self) -> None:
        """Nothing is held between calls."""


class Unpacked(TensorBase):
    """A matrix as the package compressed-tensors unpacks it, in f32."""

    grid = None
    dtype: DType = "f32"

    def __init__(self, module: Module, scheme: Any, wide: Callable[[], AbstractContextManager[None]]) -> None:
        from compressed_tensors.compressors import BaseCompressor

        self.name, self.shape = module.name, module.shape
        self._arrays, self._scheme, self._wide = module.arrays, scheme, wide
        self._compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)

    def rows(self, start: int, stop: int) -> Rows:
        """Rows of the matrix; where zero points are packed across rows, all of it is unpacked for them."""
        first, last = (0, self.shape[0]) if "weight_zero_point" in self._arrays else (start, stop)
        state = {key: _tensor(stored, *self._part(key, stored, first, last)) for key, stored in self._arrays.items()}
        if "weight_shape" in state:
            state["weight_shape"] = torch.tensor([last - first, self.shape[1]])
        with self._wide():
            found = self._compressor.decompress(state, self._scheme)["weight"].float().numpy()
        return Rows(np.ascontiguousarray(found[start - first : stop - first]))

    def _part(self, key: str, stored: MappedArray, start: int, stop: int) -> tuple[int, int]:
        """The rows of an array that belong to these rows of the matrix."""
        shape = stored.entry.shape
        if key in BY_ROWS and shape and shape[0] == self.shape[0]:
            return start, stop
        return 0, stored.matrix.shape[0]


def _tensor(stored: MappedArray, start: int, stop: int) -> torch.Tensor:
    """Rows of a stored array, in its own dtype."""
    read, shape = np.ascontiguousarray(stored.read(start, stop)), stored.entry.shape
    if stored.entry.dtype not in DTYPES:
        remedy = "give it more --memory: then transformers unpacks it"
        raise InputError(stored.path, f"{stored.entry.name} is {stored.entry.dtype}, unknown here", remedy)
    found = torch.from_numpy(read.view(np.uint8)).view(DTYPES[stored.entry.dtype])
    return found.reshape(stop - start, *shape[1:]) if len(shape) > 1 else found.reshape(shape)


def _schemes(text: Mapping[str, Any], config: Mapping[str, Any]) -> Callable[[str], Any]:
    """What the package says of a module by its name: its scheme, None for a plain one.

    Of experts, which are no modules of transformers', the only scheme that there is.
    """
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    given = config.get("quantization_config")
    if given is None:
        return lambda _: None
    settings = QuantizationConfig.model_validate(given)
    automatic: Any = transformers.AutoModelForCausalLM
    with quiet(), torch.device("meta"):
        model = automatic.from_config(config_of(text))
    apply_quantization_config(model, settings)
    known = {
        name: module.quantization_scheme
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    for scheme in (*known.values(), *settings.config_groups.values()):
        scheme.format = scheme.format or settings.format
    only = next(iter(settings.config_groups.values())) if len(settings.config_groups) == 1 else None
    return lambda name: known.get(name, only)
