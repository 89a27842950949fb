"""Round-to-nearest W4A16 with llm-compressor, run in its own environment by peers.py: MODEL OUT."""

from __future__ import annotations

import sys

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy, QuantizationType
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

model_path, out = sys.argv[1:]
weights = QuantizationArgs(
    num_bits=4, type=QuantizationType.INT, symmetric=True, strategy=QuantizationStrategy.GROUP, group_size=32
)
# The head is the embedding table, which llm-compressor leaves as it is.
recipe = QuantizationModifier(
    config_groups={"linears": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
oneshot(model=model, recipe=recipe)
model.save_pretrained(out, save_compressed=True)
AutoTokenizer.from_pretrained(model_path).save_pretrained(out)
