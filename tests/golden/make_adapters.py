"""Makes the folders of `adapters` anew with peft: adapters of small Gemmas and what it merges them to.

GEMMA3 GEMMA4 OUT: the models of the fixtures `tiny_gemma3` and `tiny_gemma4` (`lora` is made by make_lora.py).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

ROWS = 16  # of each merged matrix
NEW = ["<new-0>", "<new-1>", "<new-2>", "<new-3>"]


def make(model: PreTrainedModel, out: Path, **settings: Any) -> PreTrainedModel:
    """Write an adapter with factors that are not zero, and some rows of what it merges to; returns the merged model."""
    torch.manual_seed(len(out.name))
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) * 0.05
    shutil.rmtree(out, ignore_errors=True)
    adapted.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    config = out / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "tiny"}, indent=2) + "\n"
    )
    weights = load_file(out / "adapter_model.safetensors")
    # Tables as they are trained in practice; of the same numbers that peft would load them as.
    tables = {name: array.bfloat16() for name, array in weights.items() if array.shape[0] > 500}
    save_file({**weights, **tables}, out / "adapter_model.safetensors", metadata={"format": "pt"})
    merged: PreTrainedModel = adapted.merge_and_unload()
    changed = sorted({name.removeprefix("base_model.model.").partition(".lora_")[0] for name in weights})
    rows = {}
    for name, parameter in merged.named_parameters():
        if name.removesuffix(".weight") in changed or any(name == f"{kind}.weight" for kind in changed):
            rows[name] = parameter.detach()[:ROWS].clone()
    if "head" not in out.name:  # which is refused
        save_file(rows, out / "merged.safetensors")
    return merged


def load(base: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model


def resized(base: Path, out: Path, **settings: Any) -> None:
    """An adapter of a model with four tokens more, beside the tokenizer that has them."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), load(base)
    tokenizer.add_tokens(NEW, special_tokens=True)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    model.get_input_embeddings().weight.data = model.get_input_embeddings().weight.data.bfloat16().float()
    make(model, out, target_modules=["layers.0.mlp.down_proj"], **settings)
    tokenizer.save_pretrained(out)


gemma3, gemma4, out = map(Path, sys.argv[1:])
first = make(
    load(gemma3), out / "dora", target_modules=["layers.0.mlp.down_proj", "layers.1.self_attn.q_proj"], use_dora=True
)
make(first, out / "second", target_modules=["layers.0.mlp.down_proj", "layers.2.mlp.up_proj"])
make(load(gemma3), out / "rslora", target_modules=["layers.0.mlp.down_proj"], use_rslora=True)
make(load(gemma3), out / "head", target_modules=["lm_head", "layers.0.mlp.down_proj"])
make(load(gemma4), out / "sharing", target_modules=["k_proj", "v_proj"])
resized(gemma3, out / "resized")
