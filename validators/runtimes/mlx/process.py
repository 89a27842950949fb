"""The process that holds mlx-lm: `python -m gemexport.validators.runtimes.mlx.process FOLDER [frugal]`.

Requests are JSON lines `[method, arguments…]` on stdin, answers JSON lines on stdout, logits follow theirs as raw
float32. It ends when stdin does.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gemexport.formats.gemma.families import by_type
from gemexport.formats.gemma.names import PER_LAYER_EMBEDDING, module_of
from gemexport.formats.storage.safetensors import FLOAT_DTYPES, MappedArray, read_folder
from gemexport.validators.checks.chat import apply
from gemexport.validators.runtimes.protocol import Laps

# From so many positions on, unpacking a matrix pays: MLX's quantized product on x86-64 does a billion
# multiplications a second, whatever the number of cores.
UNPACK_FROM = 8
UNPACKED_WEIGHTS = 1 << 24  # of a matrix at a time: 64 MB


def lend_blas() -> None:
    """Let MLX compute matrix products with PyTorch's BLAS; nothing happens where that cannot be done.

    MLX's wheel for Linux brings the reference BLAS, a twentieth as fast. Symbols that are global already when its
    library is loaded come first, as with LD_PRELOAD, and `sgemm_` is the one it calls. All of PyTorch becomes global
    with it, which some libraries do not stand: one reason why this is a process of its own.
    """
    torch = find_spec("torch")
    if not sys.platform.startswith("linux") or torch is None or not torch.submodule_search_locations:
        return
    library = Path(next(iter(torch.submodule_search_locations))) / "lib" / "libtorch_cpu.so"
    if library.is_file():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class Model:
    """An MLX folder as mlx-lm loads it, set to float32."""

    def __init__(self, folder: str, frugal: bool = False) -> None:
        import mlx.core as mx
        import mlx_lm

        metal = mx.metal.is_available()
        if not metal:
            mx.set_default_device(mx.cpu)
            # On a CPU, compiled functions are built by a C++ compiler at run time; not every machine has one.
            mx.disable_compile()
            mx.quantized_matmul = unpacking(mx, mx.quantized_matmul)
        # Small floats with scales of a byte come out in bfloat16 unless told otherwise, and the rest follows.
        mx.dequantize = partial(mx.dequantize, dtype=mx.float32)
        loaded: Any
        loaded, self._tokenizer = mlx_lm.load(folder, lazy=frugal)[:2]
        # A multimodal model's decoder is a model of its own.
        self._decoder: Any = getattr(loaded, "language_model", loaded)
        # And of some families it holds one more.
        self._text: Any = getattr(self._decoder.model, "language_model", self._decoder.model)
        if frugal:
            leave_in_file(mx, Path(folder), self._text)
        self._decoder.set_dtype(mx.float32)
        mx.eval(self._decoder.parameters())
        self._mx = mx
        kind = str(self._decoder.model_type)
        family = by_type(kind)
        self._family = family if family is not None and kind == family.mlx_type else None
        self.laps = Laps()
        versions = f"mlx-lm {version('mlx-lm')} (MLX {version('mlx')}"
        self.name = f"{versions}, {'Metal' if metal else 'CPU'}, set to f32)"

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Teacher-forced logits `[len(tokens), vocab]`."""
        return np.array(self._run(tokens, self._cache()), copy=False)

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The `count` most likely next tokens."""
        cache = make_cache(self._decoder)
        continuation: list[int] = []
        while len(continuation) < count:
            continuation.append(int(self._run(tokens, cache)[-1].argmax()))
            tokens = continuation[-1:]
        return continuation

    def hidden(self, tokens: list[int]) -> np.ndarray:
        """What goes into the first layer and what each layer gives, `[layers + 1, n, hidden]`."""
        layers = self._text.layers
        seen: list[np.ndarray] = []
        plain = list(layers)
        try:
            layers[:] = [Watched(layer, seen) for layer in plain]
            self._run(tokens, self._cache())
        finally:
            layers[:] = plain
        return np.stack([seen[0], *seen[1::2]])

    def tokenize(self, text: str) -> list[int]:
        """Token ids without BOS."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def habits(self) -> dict[str, Any]:
        """What mlx-lm puts before a text, where it stops, how it pads."""
        return {
            "begins": list(self._tokenizer.encode("")),
            "stops": sorted(int(token) for token in self._tokenizer.eos_token_ids),
            "pad": self._tokenizer.pad_token_id,
        }

    def decode(self, ids: list[int]) -> str:
        """Ids as a text."""
        return str(self._tokenizer.decode(ids))

    def chat(self, layouts: list[dict[str, Any]]) -> list[str]:
        """Conversations as mlx-lm's tokenizer lays them out."""
        return [apply(self._tokenizer.apply_chat_template, layout) for layout in layouts]

    def _run(self, tokens: list[int], cache: Any) -> Any:
        ids = self._mx.array([tokens])
        with self.laps.lap(len(tokens)):
            logits = self._decoder(ids, cache=cache, **self._embedded(ids))[0]
            self._mx.eval(logits)
        return logits

    def _cache(self) -> Any:
        """A new cache, of a family whose layers share keys through one; else None."""
        shared = self._family is not None and self._family.mlx_shares_by_cache
        return make_cache(self._decoder) if shared else None

    def _embedded(self, ids: Any) -> dict[str, Any]:
        """Of a family that needs it: embeddings that make up for mlx-lm's factor, rounded to bf16 in f32 as well."""
        if self._family is None or not self._family.mlx_rounds_embed_scale:
            return {}
        scale = self._decoder.args.hidden_size**0.5
        rounded = float(self._mx.array(scale, self._mx.bfloat16).astype(self._mx.float32))
        return {"input_embeddings": self._decoder.model.embed_tokens(ids) * (scale / rounded)}


def make_cache(decoder: Any) -> Any:
    """What mlx-lm gives a model to remember keys and values in."""
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(decoder)


def by_position(hidden: Any) -> np.ndarray:
    """Hidden states `[n, width]` of `[1, n, hidden]`, or of streams `[streams, 1, n, hidden]` beside each other."""
    found = np.array(hidden)
    return found[0] if found.ndim == 3 else found[:, 0].swapaxes(0, 1).reshape(found.shape[2], -1)


class Watched:
    """A layer that notes what goes in and what comes out."""

    def __init__(self, layer: Any, seen: list[np.ndarray]) -> None:
        self._layer, self._seen = layer, seen

    def __call__(self, x: Any, *arguments: Any, **options: Any) -> Any:
        self._seen.append(by_position(x))
        output = self._layer(x, *arguments, **options)
        self._seen.append(by_position(output[0] if isinstance(output, tuple) else output))
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class Lookup:
    """A table of codes of which rows are read from the file when they are looked up: the same numbers."""

    def __init__(self, mx: Any, table: Any, stored: dict[str, MappedArray]) -> None:
        self._mx, self._stored = mx, stored
        self._layout = {"group_size": table.group_size, "bits": table.bits, "mode": table.mode}

    def __call__(self, ids: Any) -> Any:
        wanted = np.array(ids).reshape(-1)
        parts = {name: self._rows(array, wanted) for name, array in self._stored.items()}
        found = self._mx.dequantize(parts["weight"], scales=parts["scales"], biases=parts.get("biases"), **self._layout)
        return found.reshape(*ids.shape, -1)

    def _rows(self, stored: MappedArray, wanted: np.ndarray) -> Any:
        rows, kind = self._mx.array(stored.matrix[wanted]), stored.entry.dtype
        if kind == "BF16":
            rows = rows.view(self._mx.bfloat16)
        return rows.astype(self._mx.float32) if kind in FLOAT_DTYPES else rows


def leave_in_file(mx: Any, folder: Path, decoder: Any) -> None:
    """Let per-layer embeddings in codes, half of a small Gemma 4, be looked up in the file."""
    attribute = module_of(PER_LAYER_EMBEDDING).rpartition(".")[2]
    table = getattr(decoder, attribute, None)
    if table is None or not hasattr(table, "bits"):
        return
    parts = {}
    for name, stored in read_folder(folder).items():
        module, _, part = name.rpartition(".")
        if module.rpartition(".")[2] == attribute:
            parts[part] = stored
    setattr(decoder, attribute, Lookup(mx, table, parts))


def unpacking(mx: Any, quantized_matmul: Any) -> Any:
    """`mx.quantized_matmul` by `mx.dequantize` and `mx.matmul` for many positions: the same numbers, sooner."""

    def product(x: Any, w: Any, *, scales: Any, biases: Any, transpose: bool, **layout: Any) -> Any:
        if x.size // x.shape[-1] < UNPACK_FROM:
            return quantized_matmul(x, w, scales=scales, biases=biases, transpose=transpose, **layout)
        step = max(1, UNPACKED_WEIGHTS // x.shape[-1])
        parts = []
        for start in range(0, w.shape[0], step):
            own = slice(start, start + step)
            shifts = None if biases is None else biases[own]
            matrix = mx.dequantize(w[own], scales=scales[own], biases=shifts, **layout)
            parts.append(x @ mx.swapaxes(matrix, -1, -2))
            mx.eval(parts[-1])
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    return product


def serve(folder: str, frugal: bool, requests: BinaryIO, answers: BinaryIO) -> None:
    """Load, say the name or what went wrong, and answer until there are no more requests."""
    try:
        model = Model(folder, frugal)
    except Exception as error:  # whatever a foreign folder makes mlx-lm raise, the validator puts it in one line
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        answers.write(json.dumps({"error": reason}).encode() + b"\n")
        answers.flush()
        return
    answers.write(json.dumps({"name": model.name}).encode() + b"\n")
    answers.flush()
    for line in requests:
        method, *arguments = json.loads(line)
        model.laps.laps.clear()
        value = getattr(model, method)(*arguments)
        laps = {"laps": model.laps.laps}
        if isinstance(value, np.ndarray):
            answers.write(json.dumps({"value": value.shape, **laps}).encode() + b"\n")
            answers.write(np.ascontiguousarray(value, dtype=np.float32).data)
        else:
            answers.write(json.dumps({"value": value, **laps}).encode() + b"\n")
        answers.flush()


def main() -> None:
    """Keep stdout for answers, whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lend_blas()
    serve(sys.argv[1], "frugal" in sys.argv[2:], sys.stdin.buffer, answers)
    answers.close()
    os._exit(0)


if __name__ == "__main__":
    main()
