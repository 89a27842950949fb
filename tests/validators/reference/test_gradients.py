"""What the way back foretells is what a perturbed model loses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from gemexport import demo
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.gemma.names import EMBEDDING, PER_LAYER_EMBEDDING
from gemexport.formats.grids.recipe import RECIPES
from gemexport.formats.tensor import ArrayTensor, Floats, Tensor
from gemexport.validators.checks.divergence import Divergence
from gemexport.validators.reference import reference

torch = pytest.importorskip("torch")
FEW_LAYERS = {
    "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_kv_shared_layers": 1,
    "activation_sparsity_pattern": [0.8, 0.0, 0.0], "intermediate_size": 96, "hidden_size_per_layer_input": 32,
    "laurel_rank": 16,
}  # fmt: skip
LENGTHS = (100, 60) * 6  # longer than the windows; a gradient of each is a throw of the dice


@pytest.fixture(scope="module", params=["gemma3", "gemma4", "gemma3n"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = demo.config_json(request.param, demo.SIZES["tiny"]) | (FEW_LAYERS if request.param == "gemma3n" else {})
    return open_checkpoint(demo.write(tmp_path_factory.mktemp("plain") / "model", config, rule=None))


def sequences(checkpoint: Checkpoint) -> list[list[int]]:
    stream = np.random.default_rng(3)
    return [stream.integers(0, checkpoint.architecture.vocab_size, length).tolist() for length in LENGTHS]


def moved(tensor: Tensor, seed: int) -> ArrayTensor:
    """The tensor with noise of a hundredth of its spread."""
    values = tensor.numpy()
    noise = np.random.default_rng(seed).standard_normal(values.shape)
    return ArrayTensor(tensor.name, (values + 0.01 * values.std() * noise).astype(np.float32))


def lost(checkpoint: Checkpoint, others: Mapping[str, Tensor]) -> float:
    """The divergence that these tensors make in earnest."""
    exact = reference(checkpoint.text_config, checkpoint.tensors, 1)
    other = reference(checkpoint.text_config, {**checkpoint.tensors, **others}, 1)
    found = Divergence()
    for tokens in sequences(checkpoint):
        found.add(exact.logits(tokens), other.logits(tokens), tokens)
    return found.kld_mean


def test_linears(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """All of a kind moved together: what one gradient says by chance is averaged over layers and rows."""
    from gemexport.validators.reference.gradients import Backwards

    tokens = sequences(checkpoint)
    gradients: dict[str, list[Floats]] = defaultdict(list)
    with reference(checkpoint.text_config, checkpoint.tensors, 1).walk(tokens, tmp_path, keeps=True) as walk:
        for _ in walk.layers():
            pass
        back = Backwards(walk, [range(len(sequence)) for sequence in tokens])
        back.head({})
        back.layers(lambda name, x, gradient: gradients[name].append((gradient.T @ x).numpy()))
    assert not list(tmp_path.iterdir())
    # What mixes streams is used twice in a layer, and stays as it is in every recipe.
    kinds = {name.rsplit(".", 2)[1] for name in gradients if RECIPES["int4"].scheme(name) is not None}
    assert {"q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"} <= kinds
    for kind in kinds:
        others = {name: moved(checkpoint.tensors[name], 7) for name in gradients if f".{kind}." in name}
        told = 0.0
        for name, other in others.items():
            off = other.numpy() - checkpoint.tensors[name].numpy()
            told += sum(float(np.square((gradient * off).sum(1)).sum()) for gradient in gradients[name])
        assert told / (2 * sum(LENGTHS)) == pytest.approx(lost(checkpoint, others), rel=0.5), kind


def test_tables(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from gemexport.validators.reference.gradients import Backwards

    tokens = sequences(checkpoint)
    with reference(checkpoint.text_config, checkpoint.tensors, 1).walk(tokens, tmp_path, keeps=True) as walk:
        for _ in walk.layers():
            pass
        back = Backwards(walk, [range(len(sequence)) for sequence in tokens])
        place, table = 0, moved(checkpoint.tensors[EMBEDDING], 5)

        def rounding(rows: Floats) -> Floats:
            nonlocal place
            place += len(rows)
            return table.numpy()[place - len(rows) : place]

        head = back.head({"moved": rounding})["moved"]
        back.layers(lambda *_: None)
        tables = [EMBEDDING] + ([PER_LAYER_EMBEDDING] if PER_LAYER_EMBEDDING in checkpoint.tensors else [])
        for name in tables:
            others = {name: moved(checkpoint.tensors[name], 5)}
            other = reference(checkpoint.text_config, {**checkpoint.tensors, **others}, 1)
            with other.walk(tokens, tmp_path) as entered:
                told = back.entered(entered) + (head if name == EMBEDDING else 0.0)
            assert told == pytest.approx(lost(checkpoint, others), rel=0.4), name
