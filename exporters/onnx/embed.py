"""How alike texts are to the ONNX model in this script's folder: python embed.py "a text" "another" …

Needs onnxruntime, numpy and tokenizers. It shows how to feed the graph: texts of a batch are filled up at their end,
which the mask leaves out. Each text begins with BOS and ends with EOS; the model's own prompts go before it
("task: search result | query: …").
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

FOLDER = Path(__file__).parent


def encoded(texts: list[str]) -> list[list[int]]:
    """Ids of each text between BOS and EOS."""
    config = json.loads((FOLDER / "config.json").read_text("utf-8"))
    bos, eos = config["bos_token_id"], config["eos_token_id"]
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    found = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [[bos, *ids, eos[0] if isinstance(eos, list) else eos] for ids in found]


def main(texts: list[str]) -> None:
    ids = encoded(texts)
    longest = max(map(len, ids))
    tokens = np.array([[*row, *[0] * (longest - len(row))] for row in ids], np.int64)
    mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in ids], np.int64)
    options = onnxruntime.SessionOptions()
    graph = onnxruntime.InferenceSession(FOLDER / "model.onnx", options, providers=["CPUExecutionProvider"])
    (vectors,) = graph.run(["sentence_embedding"], {"input_ids": tokens, "attention_mask": mask})
    print(np.round(vectors @ vectors.T, 4))


if __name__ == "__main__":
    main(sys.argv[1:] or ["What is the capital of France?", "Paris is the capital of France."])
