"""Damaged files of every kind that is read: one line that says what is wrong, or a model; nothing else comes out.

Hypothesis chooses the damage that `benchmarks/fuzz.py` makes at random for longer; test_gguf_damage.py has more.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemexport.formats.gemma.model import architecture
from gemexport.formats.storage.errors import InputError

READERS = ("awq", "compressed-tensors", "gguf", "gptq", "imatrix", "lora", "mlx", "mobile", "safetensors")


@pytest.fixture(scope="module", params=READERS)
def samples(request: pytest.FixtureRequest, damage: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    if request.param == "mobile":
        pytest.importorskip("torch")
    found: list[Any] = damage.READERS[request.param](tmp_path_factory.mktemp(request.param))
    return found


def test_every_reader_is_here(damage: ModuleType) -> None:
    assert sorted(damage.READERS) == sorted(READERS)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choose=st.randoms(use_true_random=False))
def test_any_damage_is_read_or_refused(
    choose: random.Random, samples: list[Any], damage: ModuleType, tmp_path: Path
) -> None:
    sample = choose.choice(samples)
    copy, _ = damage.damaged(sample, tmp_path / "damaged", choose)
    damage.complaint(sample, copy)


def test_whole_files_are_read_and_empty_ones_refused(samples: list[Any], damage: ModuleType, tmp_path: Path) -> None:
    for i, sample in enumerate(samples):
        copy, _ = damage.damaged(sample, tmp_path / str(i), random.Random(0))
        for file, whole in zip(sample.files(copy), sample.files(sample.path), strict=True):
            file.write_bytes(whole.read_bytes())
        assert damage.complaint(sample, copy) == ""
        for file in sample.files(copy):
            whole = file.read_bytes()
            file.write_bytes(b"")
            # Without generation settings a model is whole, and nobody reads them here.
            assert damage.complaint(sample, copy) or file.name == "generation_config.json", file.name
            file.write_bytes(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": {}},
        {"query_pre_attn_scalar": 0.0},
        {"hidden_size": 1 << 2000},
        {"num_hidden_layers": 1 << 31, "layer_types": None},
        {"_sliding_window_pattern": "six", "layer_types": None},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 10**400}}},
    ],
)
def test_numbers_of_a_config_that_nothing_can_be_computed_with(changes: dict[str, Any], tiny_gemma3: Path) -> None:
    config = json.loads((tiny_gemma3 / "config.json").read_text())
    with pytest.raises(InputError):
        architecture({**config, **changes}, "config.json")
