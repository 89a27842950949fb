"""The reference of a model that makes one vector of a text: transformers' model, and the modules beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from gemexport import demo
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.validators.reference import reference

TOKENS = [2, 17, 5, 99, 100, 3, 64, 42, 7, 11, 12, 13, 90, 91, 92, 93, 94, 95, 33, 34, 1]


def test_vectors_are_those_of_the_modules(tmp_path: Path) -> None:
    folder = demo.make(tmp_path / "model", family="embeddinggemma", size="tiny")
    checkpoint = open_checkpoint(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    first, second = (load_file(folder / f"{i}_Dense" / "model.safetensors")["linear.weight"].float() for i in (2, 3))
    with torch.inference_mode():
        hidden = model(torch.tensor([TOKENS])).last_hidden_state
        wanted = torch.nn.functional.normalize(hidden.mean(1) @ first.T @ second.T).numpy()
    computed = reference(checkpoint.text_config, checkpoint.tensors, embedder=checkpoint.model.embedder)
    found = computed.logits(TOKENS)
    assert found.shape == (1, 64)
    np.testing.assert_allclose(found, wanted, atol=2e-7)
    cut = computed.logits(TOKENS[:-1])
    assert np.abs(cut - wanted).max() > 1e-3  # every token counts, and is seen from before
