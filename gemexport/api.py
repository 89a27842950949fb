"""The Python interface: `export` and `validate`, the same runs that the command line makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemexport.formats.checkpoint import Adapters
from gemexport.formats.grids.recipe import Recipe
from gemexport.report.console import Listener, listening
from gemexport.report.schema import ArtifactReport, Report


def export(
    model: str | Path,
    out: str | Path | None = None,
    *,
    formats: Sequence[str] | None = None,
    variants: Mapping[str, Sequence[str]] | None = None,
    recipe: str | Recipe = "default",
    jobs: int | None = None,
    memory: int | str | None = None,
    adapter: Adapters = None,
    compress: str | None = None,
    compress_python: str | Path | None = None,
    calibration: str | Path | None = None,
    tokens: int = 512,
    validate: bool = True,
    allow_partial: bool = False,
    max_kld: float | None = None,
    size: int | str | None = None,
    bits: float | None = None,
    fresh: bool = False,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    ple_codec: str | None = None,
    progress: Listener | None = None,
) -> Report:
    """Export `model` (a folder in Hugging Face layout) into every format, or those named, and validate each.

    `adapter` is the folder of a LoRA (PEFT) to merge into it, or several in order. `compress` (gptq, awq or rtn) has
    llm-compressor quantize the linears first, in the interpreter `compress_python`, on the text file `calibration`
    (docs/compress.md). `memory` is in bytes or such as "8GB", `tokens` how many the logits are compared on, `variants`
    and `options` go by format;
    `ple_codec`, such as "aqlm:2x8" or "none,aqlm:2x8", is for the per-layer embeddings, an artefact each in formats
    that hold one (docs/ple-codec.md). `progress` is called with an `Advance` whenever a step starts, advances or ends;
    what it raises ends the run. Without it there are bars on a terminal, on standard error, and nothing elsewhere. With
    `allow_partial` the report is `ok` also where something was not judged, and nothing is known to be wrong; `size`
    (bytes, or such as "2.6GB"), `bits` (of codes, in the mean) or else `max_kld` (nats) choose the width of every plain
    matrix (docs/recipes.md); `max_kld` is also the mean loss that may be, in place of the recipe's and of what is
    called `poor` (docs/bounds.md).

    Writes into `out` (default: `NAME-gemexport`) and returns what `report.json` there holds. Raises InputError when
    the request or the checkpoint is at fault, RuntimeError when a step fails without which there is nothing; an
    artefact that fails is in the report, not raised.
    """
    from gemexport.request import request
    from gemexport.run import run

    asked = request(
        model=model, out=out, formats=formats, variants=variants, recipe=recipe, jobs=jobs, memory=memory,
        adapter=adapter, compress=compress, compress_python=compress_python, calibration=calibration, tokens=tokens,
        validate=validate, allow_partial=allow_partial, max_kld=max_kld, size=size, bits=bits, fresh=fresh,
        options=options, ple_codec=ple_codec,
    )  # fmt: skip
    with listening(progress) as events:
        return run(asked, events)


def validate(
    model: str | Path,
    artifact: str | Path,
    *,
    out: str | Path | None = None,
    allow_partial: bool = False,
    recipe: str | Recipe = "default",
    tokens: int = 512,
    memory: int | str | None = None,
    adapter: Adapters = None,
    max_kld: float | None = None,
    qnn_context: str | Path | None = None,
    qnn_arch: str | None = None,
    progress: Listener | None = None,
) -> ArtifactReport:
    """Judge an artefact, whoever made it, against the checkpoint (and the LoRA adapter) it was made from.

    With `out` the reports lie in that folder, where `allow_partial` says what is well; `max_kld` is the mean
    loss that may be.
    With `qnn_context` an NPU variant of ONNX is also compiled for Qualcomm's HTP of architecture `qnn_arch` and run in
    its emulator; the context binaries appear in that folder. `progress` is as in `export`. Raises InputError when one
    of them cannot be read, RuntimeError when a step fails without which there is no verdict.
    """
    from gemexport.registry import recognise
    from gemexport.request import request
    from gemexport.run import validate as judge

    path = Path(artifact)
    target = recognise(path)
    asked = request(
        model=model, recipe=recipe, memory=memory, adapter=adapter, tokens=tokens, max_kld=max_kld,
        allow_partial=allow_partial,
    )  # fmt: skip
    context = None if qnn_context is None else Path(qnn_context)
    with listening(progress) as events:
        return judge(
            path, target, asked, events, out=None if out is None else Path(out), qnn_context=context, qnn_arch=qnn_arch
        )
