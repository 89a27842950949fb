"""Quantizes the linears of a plain checkpoint with llm-compressor: `python llm_compressor.py TASK.json`.

Run by gemexport.compress as a script, perhaps in an interpreter that has llm-compressor and no gemexport: it imports
nothing of ours. The task names the model, the output folder, the method, bits, group size and token sequences.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(path: Path) -> None:
    """Do the task in the JSON file `path` and write `done.json` beside it."""
    task: dict[str, Any] = json.loads(path.read_text("utf-8"))
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, task["dtype"])
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype, local_files_only=True)
    samples: dict[str, Any] = {}
    if task["method"] != "rtn":
        ids = task["samples"]
        columns = {"input_ids": ids, "attention_mask": [[1] * len(sample) for sample in ids]}
        samples = {
            "dataset": Dataset.from_dict(columns),
            # Else it looks for the processor that Gemma's tokenizer_config.json names, which wants an image processor.
            "processor": AutoTokenizer.from_pretrained(task["model"], local_files_only=True),
            "num_calibration_samples": len(ids),
            "max_seq_length": max(map(len, ids)),
            "shuffle_calibration_samples": False,
        }
    oneshot(model=model, recipe=recipe(task), **samples)
    model.save_pretrained(task["out"], save_compressed=True)
    done = {"version": version("llmcompressor")}
    path.with_name("done.json").write_text(json.dumps(done), "utf-8")


def recipe(task: dict[str, Any]) -> list[Any]:
    """llm-compressor's modifiers for a method: symmetric integers, one scale for a group of a row."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        QuantizationStrategy,
        QuantizationType,
    )

    weights = QuantizationArgs(
        num_bits=task["bits"],
        type=QuantizationType.INT,
        symmetric=True,
        strategy=QuantizationStrategy.GROUP,
        group_size=task["group_size"],
    )
    scheme = {"linears": QuantizationScheme(targets=["Linear"], weights=weights)}
    settings: dict[str, Any] = {"config_groups": scheme, "ignore": task["ignore"]}
    if task["method"] == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(**settings)]
    from llmcompressor.modifiers.quantization import QuantizationModifier

    if task["method"] == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier

        return [AWQModifier(), QuantizationModifier(**settings)]
    return [QuantizationModifier(**settings)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
