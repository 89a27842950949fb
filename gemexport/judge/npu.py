"""The step that hands an artefact to the NPU's own compiler, and what it says as a part of the report."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from gemexport.shared.bound import Bound
from gemexport.shared.measured import Divergence, NpuComparison, NpuRefusal, NpuReport
from gemexport.shared.place import Place, Progress


def compile_npu(place: Place, path: Path, context: Path, architecture: str | None, progress: Progress) -> NpuReport:
    """Compile the graphs in the folder `path` into `context` and run the emulator on the first chunk of a prompt.

    Progress in tokens. Raises InputError where there is no compiler, or nothing to compile.
    """
    from importlib.metadata import version

    from gemexport.validators.runtimes import qnn

    target = architecture or qnn.ARCHITECTURE
    found = qnn.compile(path, context, architecture=target)
    report = NpuReport(
        compiler=f"onnxruntime-qnn {version('onnxruntime-qnn')}",
        architecture=target,
        seconds=found.seconds,
        context=None if found.context is None else str(found.context),
        context_bytes=found.context_bytes,
        refused=tuple(NpuRefusal(**asdict(item)) for item in found.refused),
        errors=found.errors,
    )
    if found.context is None:
        return report
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    tokens = place.sequences(place.open())[0][: qnn.chunk(path) + qnn.SINGLE]
    compared = qnn.compare(path, found.context, tokens, threads=threads)
    progress(len(tokens))
    comparisons = tuple(
        NpuComparison(
            of=item.of,
            against=item.against,
            divergence=Divergence.of(item.divergence),
            max_difference=item.max_difference,
        )
        for item in compared
    )
    return report.model_copy(update={"tokens": len(tokens), "comparisons": comparisons})


def npu_bounds(report: NpuReport) -> tuple[Bound, ...]:
    """What an artefact is held to by the NPU's compiler."""
    origin = "the decoder compiles whole, with nothing left to the CPU"
    return (Bound.at_most("npu.refused", max(len(report.refused), len(report.errors)), 0, origin),)
