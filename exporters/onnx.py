"""Writes a Gemma decoder as ONNX: for ONNX Runtime (`int4`, `f32`) and for NPU compilers (`npu`).

`int4` keeps codes packed in ONNX Runtime's fused operators and `f32` keeps every weight in the source's dtype; both
compute in f32. `npu` has static shapes and the standard's operators alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx_ir as ir

from gemexport.exporters import decoder
from gemexport.exporters.genai_config import genai_config
from gemexport.exporters.onnx_graph import GraphBuilder, WeightsFile
from gemexport.exporters.onnx_runtime import OnnxRuntimeBackend
from gemexport.exporters.result import Export, Progress, ignore
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.files import atomic

VARIANTS = ("int4", "npu", "f32")
PRODUCER = "gemexport"


def export(
    checkpoint: Checkpoint,
    path: Path,
    *,
    variant: str = VARIANTS[0],
    progress: Progress = ignore,
) -> Export:
    """Write `checkpoint`, with its grids, to the folder `path`; it appears when it is whole.

    Raises InputError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    with atomic(path) as partial:
        partial.mkdir()
        notes = _write_runtime(checkpoint, partial, variant, progress)
        for file in checkpoint.tokenizer_files():
            shutil.copyfile(file, partial / file.name)
    return Export(path=path, variant=variant, run="", notes=notes, files=sorted(path.iterdir()))


def _write_runtime(checkpoint: Checkpoint, folder: Path, variant: str, progress: Progress) -> list[str]:
    """One graph with free sizes, and the configuration of onnxruntime-genai."""
    a = checkpoint.architecture
    weights = WeightsFile(checkpoint.tensors, "model.onnx.data")
    graph = GraphBuilder(checkpoint.name)
    backend = OnnxRuntimeBackend(a, graph, weights, quantized=variant == "int4")
    logits = decoder.logits(a, backend)
    shape = ["batch_size", "sequence_length", a.vocab_size]
    graph.output(logits, "logits", ir.DataType.FLOAT, shape)
    weights.write(folder, progress)
    graph.save(folder / "model.onnx", PRODUCER)
    text = json.dumps(genai_config(a, "model.onnx"), indent=2, sort_keys=True)
    (folder / "genai_config.json").write_text(f"{text}\n", "utf-8")
    return []
