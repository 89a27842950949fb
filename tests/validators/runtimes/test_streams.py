"""Programs that know a Gemma 3n give its logits, and show all of its streams layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport import demo
from gemexport.exporters import gguf, mlx
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.validators.checks.divergence import Divergence
from gemexport.validators.checks.layers import departure
from gemexport.validators.reference import Arithmetic, reference

Export = Callable[..., Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("streams") / "model"
    return open_checkpoint(demo.make(folder, family="gemma3n", size="tiny", rule=None))


@pytest.mark.parametrize(
    ("export", "variant", "package", "adapter", "played", "limit"),
    [
        (gguf.export, "F32", "xllamacpp", "llama_cpp", "f32-f16-gelu", 2e-6),
        (mlx.export, "f32", "mlx_lm", "mlx", "f32", 1e-9),
    ],
    ids=["llama.cpp", "mlx-lm"],
)
def test_logits_and_layers_are_those_of_the_reference(
    export: Export, variant: str, package: str, adapter: str, played: Arithmetic, limit: float,
    checkpoint: Checkpoint, tmp_path: Path,
) -> None:  # fmt: skip
    pytest.importorskip(package)
    path = export(checkpoint, tmp_path / f"artefact{'.gguf' if adapter == 'llama_cpp' else ''}", variant=variant).path
    # Longer than the window, and ids that have no row among the per-layer embeddings.
    tokens = np.random.default_rng(5).permutation(checkpoint.architecture.vocab_size)[:100].tolist()
    assert checkpoint.architecture.per_layer is not None
    assert max(tokens) >= checkpoint.architecture.per_layer.vocab_size
    expected = reference(checkpoint.text_config, checkpoint.tensors, 1, dtype=played)
    runtime = import_module(f"gemexport.validators.runtimes.{adapter}").load(path, threads=1, context=256)
    try:
        found, total = runtime.logits(tokens), Divergence()
        total.add(expected.logits(tokens), found, tokens)
        assert total.kld_mean < limit
        assert runtime.greedy(tokens, 1) == [int(found[-1].argmax())]
        hidden = runtime.hidden(tokens)
        assert len(hidden) == len(checkpoint.architecture.layers) + 1
        assert hidden[0].shape == (len(tokens), 4 * checkpoint.architecture.hidden_size)
        assert departure(hidden, expected.hidden(tokens), 2e-3) is None
    finally:
        runtime.close()
