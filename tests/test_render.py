"""The report as people see it: the page, the job summary and the terminal, from one made-up but realistic run."""

from __future__ import annotations

import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from gemexport import render
from gemexport.report import (
    ArtifactReport,
    Bound,
    Divergence,
    ExportStats,
    FileReport,
    GreedyReport,
    GridReport,
    LatticeReport,
    LatticeTensor,
    LogitsReport,
    ModelReport,
    Report,
    TensorReport,
    TokenizerDifference,
    TokenizerReport,
    WeightsReport,
    verdict,
)

GRID = GridReport(bits=4, block=32, scale_dtype="bf16", lossless=True)
MATRICES = {
    "self_attn.q_proj": (1024, 640),
    "self_attn.k_proj": (256, 640),
    "self_attn.v_proj": (256, 640),
    "self_attn.o_proj": (640, 1024),
    "mlp.gate_proj": (2048, 640),
    "mlp.up_proj": (2048, 640),
    "mlp.down_proj": (640, 2048),
}
NORMS = {"input_layernorm": 640, "post_attention_layernorm": 640, "self_attn.q_norm": 256, "self_attn.k_norm": 256}
FLOOR = Divergence(kld_mean=0.0034, kld_max=0.081, top1_agreement=0.963, perplexity_ratio=1.00041)


def tensor(name: str, shape: tuple[int, ...], fraction: float) -> TensorReport:
    count = 1
    for dimension in shape:
        count *= dimension
    exact = round(count * fraction)
    grid = GRID if len(shape) == 2 else None
    error = 0.0 if exact == count else 0.031
    return TensorReport(
        name=f"{name}.weight",
        shape=shape,
        dtype="bf16",
        grid=grid.model_copy(update={"scale_dtype": "f16"}) if grid else None,
        source_grid=grid,
        compared=count,
        exact=exact,
        exact_fraction=exact / count,
        max_relative_error=error,
        rms_relative_error=error / 3,
    )


def weights(fraction: float = 1.0, layers: int = 18) -> WeightsReport:
    tensors = [tensor("model.embed_tokens", (262144, 640), 1.0)]
    for layer in range(layers):
        for kind, shape in MATRICES.items():
            # The further down the network, the worse: every class of the heat map occurs.
            share = 1.0 if fraction == 1.0 else 1.0 - (1.0 - fraction) * (layer / layers) ** 4 * 1.5
            tensors.append(tensor(f"model.layers.{layer}.{kind}", shape, share))
        tensors += [tensor(f"model.layers.{layer}.{kind}", (size,), 1.0) for kind, size in NORMS.items()]
    tensors.append(tensor("model.norm", (640,), 1.0))
    compared, exact = sum(t.compared for t in tensors), sum(t.exact for t in tensors)
    worst = max(t.max_relative_error for t in tensors)
    return WeightsReport(
        compared=compared, exact=exact, exact_fraction=exact / compared, max_relative_error=worst, tensors=tuple(tensors)
    )  # fmt: skip


def logits(runtime: str, arithmetic: str, conversion: float, loss: float, **more: object) -> LogitsReport:
    def divergence(kld: float) -> Divergence:
        return Divergence(kld_mean=kld, kld_max=kld * 41, top1_agreement=1 - kld**0.5 / 2, perplexity_ratio=1 + kld / 3)

    return LogitsReport.model_validate(
        {
            "runtime": runtime,
            "arithmetic": arithmetic,
            "tokens": 2048,
            "reference": "transformers 5.23.0 · f32",
            "conversion": divergence(conversion),
            "loss": divergence(loss),
            "noise_floor": FLOOR,
            "seconds": 21.5,
            **more,
        }
    )


def artifact(
    name: str, variant: str, path: str, size: int, run: str, scores: LogitsReport, **more: object
) -> ArtifactReport:
    digest = hashlib.sha256(path.encode()).hexdigest()
    stored = more.pop("weights", None) or weights()
    assert isinstance(stored, WeightsReport)
    assert scores.conversion is not None
    assert scores.loss is not None
    f32 = scores.arithmetic == "f32"
    limit, origin = (1e-5, "arithmetic f32") if f32 else (2 * FLOOR.kld_mean, "twice PyTorch's bf16 noise floor")
    measured = scores.conversion.kld_mean if f32 else scores.loss.kld_mean
    bounds = (
        Bound.at_least("weights.exact_fraction", stored.exact_fraction, 1.0, "the source lies on a grid it can hold"),
        Bound.at_most("logits.conversion.kld_mean" if f32 else "logits.loss.kld_mean", measured, limit, origin),
        Bound.at_least("tokenizer.equal", 40, 40, "every text"),
    )
    status, reason = verdict(bounds)
    return ArtifactReport.model_validate(
        {
            "format": name,
            "variant": variant,
            "path": path,
            "bytes": size,
            "sha256": digest,
            "files": (FileReport(path=path, bytes=size, sha256=digest),),
            "status": status,
            "reason": reason,
            "run": run,
            "export": ExportStats(seconds=3.2, peak_rss_bytes=212_000_000),
            "weights": stored,
            "tokenizer": TokenizerReport(texts=40, equal=40, name=scores.runtime),
            "logits": scores,
            "bounds": bounds,
            "seconds": 41.7,
            **more,
        }
    )


def sample_report(layers: int = 18) -> Report:
    """Six artefacts, of which ONNX for NPUs fails, one skipped and one that stopped with an error."""
    out = "gemma-3-270m-it-qat"
    difference = TokenizerDifference(text="Café déjà vu — 123 😊", expected=(2, 44, 901), found=(2, 44, 17, 8))
    artifacts = (
        artifact("gguf", "Q4_0", f"gguf/{out}-Q4_0.gguf", 151_212_416, f"llama-server -m out/gguf/{out}-Q4_0.gguf",
                 logits("llama.cpp 2026.10 (xllamacpp)", "int8-activations", 0.0035, 0.0035, top_k=4096),
                 weights=weights(layers=layers)),
        artifact("mlx", "4bit", "mlx/4bit", 184_000_512, "mlx_lm.generate --model out/mlx/4bit --prompt 'Hello'",
                 logits("mlx 0.32.4 (cpu)", "f32", 3.1e-9, 3.1e-9), weights=weights(layers=layers),
                 notes=("Scales are f32: with bf16 scales only 61 % of the values are exact at run time.",)),
        artifact("onnx", "int4", "onnx/int4", 176_300_000, "python -m onnxruntime_genai.models --model out/onnx/int4",
                 logits("onnxruntime 1.32.0", "f32", 2.2e-8, 2.2e-8, greedy=GreedyReport(tokens=32, equal=32)),
                 weights=weights(layers=layers)),
        artifact("onnx", "npu", "onnx/npu", 176_900_000, "python -m onnxruntime_genai.models --model out/onnx/npu",
                 logits("onnxruntime 1.32.0", "f32", 0.41, 0.62), weights=weights(0.4, layers),
                 tokenizer=TokenizerReport(texts=40, equal=39, name="onnxruntime", differences=(difference,))),
        artifact("coreml", "int4", "coreml/int4.mlpackage", 152_900_000, "open out/coreml/int4.mlpackage",
                 logits("MIL evaluator (PyTorch)", "f32", 4e-8, 4e-8), weights=weights(layers=layers),
                 more_logits=(logits("MIL evaluator (PyTorch)", "f16", 0.0002, 0.0002),)),
        ArtifactReport(format="compressed-tensors", variant="w4a16", status="error", seconds=0.4,
                       reason="ImportError: No module named 'compressed_tensors'; pip install 'gemexport[all]'"),
        ArtifactReport(format="gguf", variant="BF16", status="skipped", reason="--skip gguf/BF16"),
    )  # fmt: skip
    found = tuple(
        LatticeTensor(name=t.name, shape=t.shape, dtype="bf16", grid=GRID, grid_fraction=1.0)
        for t in weights(layers=layers).tensors
        if len(t.shape) == 2
    )
    on_grid = weights(layers=layers).compared
    model = ModelReport(
        name=out,
        architecture="gemma3",
        parameters=268_098_176,
        bytes=536_196_352,
        source="checkpoints/gemma-3-270m-it-qat",
        left_out=("vision_tower", "multi_modal_projector"),
        lattice=LatticeReport(weights=on_grid, on_grid=on_grid - 40_000, seconds=1.9, tensors=found),
    )
    return Report(
        model=model,
        recipe="exact",
        versions={"gemexport": "0.1.0", "torch": "2.13.0", "mlx": "0.32.4"},
        artifacts=artifacts,
        seconds=251.3,
        peak_rss_bytes=3_400_000_000,
    )
