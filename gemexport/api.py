"""The Python interface: `export` and `validate`, the same runs that the command line makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gemexport.formats.grids.recipe import Recipe
from gemexport.report.schema import ArtifactReport, Report


def export(
    model: str | Path,
    out: str | Path | None = None,
    *,
    formats: list[str] | None = None,
    variants: dict[str, tuple[str, ...]] | None = None,
    recipe: str | Recipe = "default",
    jobs: int | None = None,
    memory: int | None = None,
    adapter: str | Path | None = None,
    compress: str | None = None,
    compress_python: str | Path | None = None,
    calibration: str | Path | None = None,
    tokens: int = 512,
    validate: bool = True,
    fresh: bool = False,
    options: dict[str, dict[str, Any]] | None = None,
    ple_codec: str | None = None,
) -> Report:
    """Export `model` (a folder in Hugging Face layout) into every format, or those named, and validate each.

    `adapter` is the folder of a LoRA (PEFT) to merge into it. `compress` (gptq, awq or rtn) has llm-compressor quantize
    the linears first, in the interpreter `compress_python`, on the text file `calibration` (docs/compress.md). `memory`
    is in bytes, `tokens` how many the logits are compared on, `variants` and `options` go by format; `ple_codec`, such
    as "aqlm:2x8" or "none,aqlm:2x8", is for the per-layer embeddings, an artefact each in formats that hold one
    (docs/ple-codec.md). Writes into `out` (default: `NAME-gemexport`) and returns what `report.json` there holds.
    Raises InputError when the request or the checkpoint is at fault; an artefact that fails is in the report, not
    raised.
    """
    from gemexport.request import request
    from gemexport.run import run

    asked = request(
        model, out, formats, None, variants, recipe, jobs, memory, adapter, compress, compress_python, calibration,
        ple_codec, tokens=tokens, validate=validate, fresh=fresh, options=options or {},
    )  # fmt: skip
    return run(asked)


def validate(
    model: str | Path,
    artifact: str | Path,
    *,
    recipe: str | Recipe = "default",
    tokens: int = 512,
    memory: int | None = None,
    adapter: str | Path | None = None,
    qnn_context: str | Path | None = None,
    qnn_arch: str | None = None,
) -> ArtifactReport:
    """Judge an artefact, whoever made it, against the checkpoint (and the LoRA adapter) it was made from.

    With `qnn_context` an NPU variant of ONNX is also compiled for Qualcomm's HTP of architecture `qnn_arch` and run in
    its emulator; the context binaries appear in that folder. Raises InputError when one of them cannot be read.
    """
    from gemexport.registry import recognise
    from gemexport.request import request
    from gemexport.run import validate as judge

    path = Path(artifact)
    target = recognise(path)
    asked = request(model, None, [], recipe=recipe, memory=memory, adapter=adapter, tokens=tokens)
    context = None if qnn_context is None else Path(qnn_context)
    return judge(path, target, replace(asked, variants={}), qnn_context=context, qnn_arch=qnn_arch)
