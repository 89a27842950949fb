"""Continues a text with the ONNX model in this script's folder: python generate.py "The capital of France is" [tokens].

Needs onnxruntime, numpy and tokenizers. It shows how to feed the graphs: one of free sizes (model.onnx), or the three
of fixed size made for an NPU (embeddings.onnx, prefill.onnx, decode.onnx).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

Arrays = dict[str, Any]
DTYPES = {
    "tensor(float)": "f4",
    "tensor(int8)": "i1",
    "tensor(uint8)": "u1",
    "tensor(int16)": "i2",
    "tensor(uint16)": "u2",
}


def session(file: Path) -> onnxruntime.InferenceSession:
    """One graph on the CPU, computing in f32."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # Where activations are integers: without it kernels of processors without VNNI saturate.
    options.add_session_config_entry("session.x64quantprecision", "1")
    # Static scales of activations as the graph says them, in f32.
    rounds = b"QuantizeLinear" in file.read_bytes()
    options.add_session_config_entry("session.disable_quant_qdq", "1" if rounds else "0")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def run(graph: onnxruntime.InferenceSession, inputs: Arrays, cache: Arrays) -> Any:
    """The logits after the last position; what the graph remembers goes into `cache`."""
    names = [output.name for output in graph.get_outputs()]
    outputs = dict(zip(names, graph.run(names, inputs | cache), strict=True))
    cache |= {name.replace("present", "past_key_values"): outputs[name] for name in names if name != "logits"}
    return outputs["logits"][0, -1]


def empty(graph: onnxruntime.InferenceSession) -> Arrays:
    """Caches that hold nothing yet: for one sequence, of length 0 where the length is free, else zeros."""
    caches = {}
    for item in graph.get_inputs():
        if item.name.startswith("past_key_values."):
            shape = [size if isinstance(size, int) else int(axis == 0) for axis, size in enumerate(item.shape)]
            caches[item.name] = np.zeros(shape, DTYPES[item.type])
    return caches


class Free:
    """One graph: any number of tokens at once."""

    def __init__(self, file: Path) -> None:
        self.graph = session(file)
        self.cache = empty(self.graph)
        self.seen = 0

    def feed(self, tokens: list[int]) -> Any:
        """The logits after `tokens`."""
        start, self.seen = self.seen, self.seen + len(tokens)
        inputs = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, self.seen), np.int64),
            "position_ids": np.arange(start, self.seen, dtype=np.int64)[None],
        }
        return run(self.graph, inputs, self.cache)


class Fixed:
    """The prompt in chunks of one size, then one token at a time."""

    def __init__(self, folder: Path) -> None:
        self.lookup, self.prefill, self.decode = (
            session(folder / f"{name}.onnx") for name in ("embeddings", "prefill", "decode")
        )
        self.cache = empty(self.decode)
        shapes = {item.name: item.shape for item in self.prefill.get_inputs()}
        self.chunk = int(shapes["position_ids"][1])
        self.seen = 0

    def feed(self, tokens: list[int]) -> Any:
        """The logits after `tokens`: the odd chunk comes first, its padding before position 0."""
        graph, size = (self.prefill, self.chunk) if self.seen == 0 else (self.decode, 1)
        padding = -len(tokens) % size
        ids = np.array([[0] * padding + tokens], np.int64)
        positions = np.arange(self.seen - padding, self.seen + len(tokens), dtype=np.int32)[None]
        self.seen += len(tokens)
        for start in range(0, ids.shape[1], size):
            part = slice(start, start + size)
            names = [output.name for output in self.lookup.get_outputs()]
            found = self.lookup.run(names, {"input_ids": ids[:, part]})
            inputs = dict(zip(names, found, strict=True)) | {"position_ids": positions[:, part]}
            logits = run(graph, inputs, self.cache)
        return logits


def main() -> None:
    """Print the prompt and its likeliest continuation."""
    folder = Path(__file__).resolve().parent
    prompt = sys.argv[1] if len(sys.argv) > 1 else "The capital of France is"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 40
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = folder / "generation_config.json"
    end = json.loads(settings.read_text("utf-8")).get("eos_token_id", []) if settings.is_file() else []
    stop = set(end if isinstance(end, list) else [end])
    tokens = tokenizer.encode(prompt).ids
    free = [*folder.glob("model.onnx"), *folder.glob("onnx/*.onnx")]  # the latter is where transformers.js looks
    model = Free(free[0]) if free else Fixed(folder)
    found = [int(model.feed(tokens).argmax())]
    while len(found) < count and found[-1] not in stop:
        found.append(int(model.feed(found[-1:]).argmax()))
    print(tokenizer.decode(tokens + found))


if __name__ == "__main__":
    main()
