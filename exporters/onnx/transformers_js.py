"""The layout in which transformers.js looks for a model: graphs in the folder `onnx`, called by how they are quantized.

Its `dtype` names the file (`q4` is model_q4.onnx, `fp32` model.onnx), and config.json says how many files of external
data there are (https://huggingface.co/docs/transformers.js).
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir

from gemexport.exporters.onnx.graph import PRODUCER
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.onnx import NESTED, read_model
from gemexport.formats.storage.errors import InputError

FILES = {"int4": "model_q4.onnx", "f32": "model.onnx"}
DTYPES = {"int4": "q4", "f32": "fp32"}
ONE_GRAPH = ("gemma3_text",)  # decoders that version 4.3 runs in one graph; of Gemma 4 it wants two


def check(checkpoint: Checkpoint, variant: str) -> None:
    """Raise InputError for what transformers.js cannot run in this layout."""
    if variant not in FILES:
        raise InputError(variant, "has no layout for transformers.js", f"use one of {', '.join(FILES)}")
    kind = checkpoint.text_config.get("model_type")
    if kind not in ONE_GRAPH or checkpoint.model.embedder is not None:
        problem = f"transformers.js does not run {kind} in one graph"
        raise InputError(checkpoint.path, problem, f"leave out the layout; it runs {', '.join(ONE_GRAPH)}")


def arrange(folder: Path, variant: str) -> None:
    """Move model.onnx and its data where transformers.js looks, and say so in the configurations beside them."""
    name = FILES[variant]
    data = f"{name}_data"
    (folder / NESTED).mkdir()
    model = read_model(folder / "model.onnx")
    for value in model.graph.initializers.values():
        stored = value.const_value
        if isinstance(stored, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                data, stored.offset, stored.length, stored.dtype,
                shape=stored.shape, name=stored.name or "", metadata_props=dict(stored.metadata_props),
            )  # fmt: skip
    model.producer_name = PRODUCER
    ir.save(model, folder / NESTED / name)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx.data").rename(folder / NESTED / data)
    _say(folder / "config.json", {"transformers.js_config": {
        "dtype": DTYPES[variant], "use_external_data_format": {name: 1},
    }})  # fmt: skip
    genai = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
    genai["decoder"]["filename"] = f"{NESTED}/{name}"
    _say(folder / "genai_config.json", {"model": genai})


def _say(file: Path, more: dict[str, object]) -> None:
    """Put keys into a JSON file."""
    config = {**json.loads(file.read_text("utf-8")), **more}
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
