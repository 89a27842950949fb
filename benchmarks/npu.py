"""Two decoder layers of E2B's widths through Qualcomm's compiler and emulator: `python benchmarks/npu.py`.

Random weights, one sliding and one full layer with per-layer embeddings, E2B's own widths but for the
vocabulary. Prints what docs/npu.md shows. Needs gemexport[onnx,npu] and Linux on x86-64.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

from gemexport import demo
from gemexport.exporters import onnx
from gemexport.exporters.onnx import quantized as onnx_quantized
from gemexport.formats.activations.ranges import Activations
from gemexport.formats.checkpoint import Checkpoint
from gemexport.validators.checks.divergence import Divergence
from gemexport.validators.runtimes import onnxruntime as adapter
from gemexport.validators.runtimes import qnn
from gemexport.validators.runtimes.onnxruntime import NPU_GRAPHS, NpuModel, Session, cpu_session

SETTINGS = {
    "npu-a16": Activations(bits=16, linear_bits=16, cache_bits=16),
    "npu-a8": Activations(bits=16, linear_bits=8, cache_bits=8),
    "8 bits everywhere": Activations(bits=8, linear_bits=8, cache_bits=8),
}


def config(vocab: int) -> dict[str, object]:
    """The text config of E2B with two of its layers."""
    return {
        "model_type": "gemma4_text", "hidden_size": 1536, "intermediate_size": 6144, "num_attention_heads": 8,
        "num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512, "sliding_window": 512,
        "hidden_size_per_layer_input": 256, "vocab_size": vocab, "vocab_size_per_layer_input": vocab,
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "final_logit_softcapping": 30.0, "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
    }  # fmt: skip


def default_cpu(path: Path, length: int) -> NpuModel:
    """The CPU provider as it comes: no session.x64quantprecision, no session.qdq_matmulnbits_accuracy_level."""

    def opened(name: str, file: Path) -> Session:
        if name == "embeddings":
            return cpu_session(file, 1)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session: Session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return session

    model = NpuModel(path, {name: path / f"{name}.onnx" for name in NPU_GRAPHS}, length, opened)
    model.single = qnn.SINGLE
    return model


def line(name: str, p: np.ndarray, q: np.ndarray, tokens: list[int]) -> str:
    """How far `q` is from `p`."""
    total = Divergence()
    total.add(p, q, tokens)
    worst, top1 = float(np.abs(p - q).max()), total.top1_agreement
    return (
        f"  {name:24} KLD {total.kld_mean:.2g} (max {total.kld_max:.2g}), top-1 {top1:.1%}, logits within {worst:.3g}"
    )


def measure(checkpoint: Checkpoint, setting: str, folder: Path, sizes: dict[str, int], tokens: list[int]) -> None:
    """Export, compile, run and print."""
    onnx_quantized.PRECISIONS["npu-a16"] = SETTINGS[setting]
    path = folder / setting.replace(" ", "-")
    onnx.export(checkpoint, path, variant="npu-a16", calibration=[tokens], **sizes)
    made = qnn.compile(path, folder / "context")
    print(f"{setting}: compiled {made.compiled}, {made.seconds:.0f} s, {made.context_bytes / 1e6:.1f} MB", flush=True)
    for refusal in made.refused:
        print(f"  {refusal}")
    if made.context is None:
        print("\n".join(made.errors))
        return
    judged = tokens[: sizes["prefill"] + qnn.SINGLE]
    exact = np.asarray(qnn.exact(path, length=len(judged)).logits(judged), np.float32)
    started = time.monotonic()
    htp = np.asarray(qnn.load(path, made.context, threads=1, length=len(judged)).logits(judged))
    print(f"  the emulator took {time.monotonic() - started:.0f} s for {len(judged)} tokens")
    cpu = np.asarray(qnn.on_cpu(path, threads=1, length=len(judged)).logits(judged))
    print(line("emulator against exact", exact, htp, judged))
    print(line("CPU provider against exact", exact, cpu, judged))
    print(line("emulator against CPU", cpu, htp, judged))
    print(line("CPU as it comes", exact, np.asarray(default_cpu(path, len(judged)).logits(judged)), judged))
    plain = folder / "npu"
    if not plain.exists():
        onnx.export(checkpoint, plain, variant="npu", **sizes)
    floats = adapter.load(plain, threads=1, context=len(judged))
    print(line("exact against f32", np.asarray(floats.logits(judged)), exact, judged), flush=True)


def main() -> None:
    """Every setting, or the one that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--weights", type=int, default=4, help="bits")
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--context", type=int, default=2048)
    asked = parser.parse_args()
    checkpoint = demo.in_memory(config(asked.vocab), bits=asked.weights)
    tokens = np.random.default_rng(0).integers(0, asked.vocab, 4 * asked.prefill).tolist()
    for setting in [asked.setting] if asked.setting else SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            sizes = {"prefill": asked.prefill, "context": asked.context}
            measure(checkpoint, setting, Path(folder), sizes, tokens)


if __name__ == "__main__":
    main()
