"""Makes `lora` anew with peft: an adapter of a small Gemma 3 and what peft merges it to. BASE OUT

BASE is the model of the fixture `tiny_gemma3`: gemexport.demo.make(BASE, family="gemma3", size="tiny", rule="max/7.5").
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base, out = map(Path, sys.argv[1:])
torch.manual_seed(0)
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
    LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=[
            "embed_tokens",
            *(f"{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")),
        ],
        rank_pattern={"layers.1.self_attn.q_proj": 6},
        alpha_pattern={"layers.0.mlp.down_proj": 8},
        task_type="CAUSAL_LM",
    ),
)
for name, parameter in model.named_parameters():
    if "lora_" in name:
        parameter.data.normal_(std=0.05)
model.save_pretrained(out, save_embedding_layers=False)
changed = {
    name.partition(".lora_")[0].removeprefix("base_model.model.") for name in model.state_dict() if "lora_" in name
}
merged = model.merge_and_unload()
first = {f"{name}.weight": merged.get_parameter(f"{name}.weight").detach()[:64].clone() for name in sorted(changed)}
save_file(first, out / "merged.safetensors")  # 64 rows of each
(out / "README.md").unlink(missing_ok=True)
