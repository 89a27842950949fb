"""What the dtype of an MLX file's scales costs: `python benchmarks/mlx_scales.py MODEL [--tokens N]` prints the table.

Each file runs in mlx-lm as it is, in the dtype of its scales, and is held against the reference in f32. Two ways of
multiplying are measured: matrices unpacked into that dtype first, as a GPU does for a prompt, and MLX's quantized
product on the CPU, which is slow, so it gets few tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gemexport.exporters import mlx
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.grids.recipe import RECIPES
from gemexport.formats.grids.search import attach, find_grids
from gemexport.validators.checks import prompts, tokenizer
from gemexport.validators.checks.divergence import Divergence
from gemexport.validators.reference import reference

DTYPES = ("bf16", "f16", "f32")


def run(folder: Path, sequences: Path, kernel_tokens: int, out: Path) -> None:
    """In a process of its own: logits of the file as it is, unpacked and by the kernel; CPU time of decoding."""
    from gemexport.validators.runtimes.mlx.process import lend_blas

    lend_blas()
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.models.cache import make_prompt_cache

    from gemexport.validators.runtimes.mlx.process import unpacking

    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    model = mlx_lm.load(str(folder))[0]
    kernel = mx.quantized_matmul
    tokens: list[list[int]] = json.loads(sequences.read_text())

    def logits(ids: list[int]) -> np.ndarray:
        found = model(mx.array([ids]))[0].astype(mx.float32)
        mx.eval(found)
        return np.array(found)

    mx.quantized_matmul = unpacking(mx, kernel)
    for i, ids in enumerate(tokens):
        np.save(out / f"unpacked-{i}.npy", logits(ids))
    mx.quantized_matmul = kernel
    np.save(out / "kernel.npy", logits(tokens[0][:kernel_tokens]))
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[2]]), cache=cache))
    spent = []
    for token in range(4):
        started = time.process_time()
        mx.eval(model(mx.array([[token]]), cache=cache))
        spent.append(time.process_time() - started)
    (out / "seconds.json").write_text(json.dumps(min(spent)))


def exact_values(checkpoint: Checkpoint, folder: Path) -> float:
    """Fraction of the quantized weights that `mx.dequantize` gives back bit for bit, in the source's dtype."""
    import mlx.core as mx

    stored = mx.load(str(folder / "model.safetensors"))
    equal = total = 0
    for name, tensor in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if f"{module}.scales" not in stored:
            continue
        words, scales, biases = (stored[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
        group = tensor.shape[1] // scales.shape[1]
        bits = words.shape[1] * 32 // tensor.shape[1]
        step = max(1, (1 << 24) // tensor.shape[1])
        for start in range(0, tensor.shape[0], step):
            own = slice(start, start + step)
            values = mx.dequantize(words[own], scales[own], biases[own], group_size=group, bits=bits)
            values = np.array(values.astype(mx.bfloat16).astype(mx.float32))
            equal += int((values == tensor.rows(start, min(start + step, tensor.shape[0])).values).sum())
            total += values.size
    return equal / total


def measure(checkpoint: Checkpoint, work: Path, tokens: int, kernel_tokens: int) -> list[dict[str, Any]]:
    """One row for each dtype of scales, and one for PyTorch's own bf16."""
    encode = tokenizer.load(checkpoint.path / "tokenizer.json")
    sequences = prompts.sequences([encode(text) for text in prompts.prompts()], checkpoint.architecture, tokens)
    (work / "sequences.json").write_text(json.dumps(sequences))
    exact = reference(checkpoint.text_config, checkpoint.tensors)
    expected = [exact.logits(sequence) for sequence in sequences]
    rows = []
    for dtype in DTYPES:
        folder, out = work / dtype, work / f"{dtype}-logits"
        out.mkdir()
        mlx.export(checkpoint, folder, scales=dtype)  # type: ignore[arg-type]
        arguments = [folder, work / "sequences.json", kernel_tokens, out]
        subprocess.run([sys.executable, __file__, "--run", *map(str, arguments)], check=True)
        unpacked, kernel = Divergence(), Divergence()
        for i, (logits, sequence) in enumerate(zip(expected, sequences, strict=True)):
            unpacked.add(logits, np.load(out / f"unpacked-{i}.npy", mmap_mode="r"), sequence)
        kernel.add(expected[0][:kernel_tokens], np.load(out / "kernel.npy"), sequences[0][:kernel_tokens])
        rows.append(
            {
                "scales": dtype,
                "bytes": (folder / "model.safetensors").stat().st_size,
                "exact values": exact_values(checkpoint, folder),
                "unpacked": unpacked,
                "kernel": kernel,
                "CPU seconds a token": json.loads((out / "seconds.json").read_text()),
            }
        )
        print_row(rows[-1])
    rounded, floor = reference(checkpoint.text_config, checkpoint.tensors, dtype="bf16"), Divergence()
    for logits, sequence in zip(expected, sequences, strict=True):
        floor.add(logits, rounded.logits(sequence), sequence)
    print(f"PyTorch in bf16: {figures(floor)}")
    return rows


def figures(found: Divergence) -> str:
    """Mean KL divergence in nats and top-1 agreement."""
    return f"{found.kld_mean:.3g} ({100 * found.top1_agreement:.1f} %, {found.positions} tokens)"


def print_row(row: dict[str, Any]) -> None:
    """A line of the table in docs/mlx-scales.md."""
    cells = [
        row["scales"],
        f"{row['bytes'] / 1e6:.1f} MB",
        f"{100 * row['exact values']:.2f} %",
        figures(row["unpacked"]),
        figures(row["kernel"]),
        f"{row['CPU seconds a token']:.2g} s",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Parse the command line."""
    if sys.argv[1:2] == ["--run"]:
        folder, sequences, kernel_tokens, out = sys.argv[2:]
        run(Path(folder), Path(sequences), int(kernel_tokens), Path(out))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--kernel-tokens", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        checkpoint = open_checkpoint(options.model)
        find_grids(checkpoint, Path(work) / "grids", RECIPES["default"])
        checkpoint = attach(checkpoint, Path(work) / "grids")
        measure(checkpoint, Path(work), options.tokens, options.kernel_tokens)


if __name__ == "__main__":
    main()
