"""Checkpoints that many tests share: tiny random models on an int4 grid, made once a session."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from samples import with_grids

from gemexport import demo
from gemexport.formats.assets import kept
from gemexport.formats.checkpoint import Checkpoint

# The same examples in every run: what fails once in a hundred runs is for HYPOTHESIS_PROFILE=explore to find, not for
# whoever changes something else.
# None has to be ready by a deadline: that would fail on a busy machine.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that runs here, in whatever process, reads or leaves what a user's commands keep."""
    before = os.environ.get(kept.WHERE)
    os.environ[kept.WHERE] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ[kept.WHERE]
    else:
        os.environ[kept.WHERE] = before


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of half a million weights, in bf16, on a block-32 grid with scales of max/7.5. Do not write to it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-gemma3"
    return demo.make(folder, family="gemma3", size="tiny", rule="max/7.5")


@pytest.fixture(scope="session")
def tiny_gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 with every feature of E2B, in bf16, on a block-32 grid with scales of max/7. Do not write to it."""
    return demo.make(tmp_path_factory.mktemp("checkpoints") / "tiny-gemma4", size="tiny")


@pytest.fixture(scope="session")
def tiny_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 like 26B-A4B, experts beside every MLP, in bf16 on a block-32 grid. Do not write to it."""
    return demo.make(tmp_path_factory.mktemp("checkpoints") / "tiny-experts", size="tiny", experts=True)


@pytest.fixture(scope="session")
def gemma3(tiny_gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny Gemma 3 with its grids, by the default recipe."""
    return with_grids(tiny_gemma3, tmp_path_factory.mktemp("grids") / "gemma3")


@pytest.fixture(scope="session")
def gemma4(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny Gemma 4 with its grids, by the default recipe."""
    return with_grids(tiny_gemma4, tmp_path_factory.mktemp("grids") / "gemma4")


# Where the blocks of K-quants have f16 numbers.
K_FACTORS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
MIXED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ2_0", "MXFP4", *K_FACTORS, "TQ1_0", "F16")


@pytest.fixture(scope="session")
def mixed_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a small Gemma 3 whose matrices are of every type with codes, and two without. Do not write to it.

    gguf-py quantizes what it can; for the K-quants, which it only reads, the blocks are random bytes on small scales.
    """
    gguf = pytest.importorskip("gguf")
    from gemexport.exporters import gguf as exporter
    from gemexport.formats.checkpoint import open_checkpoint
    from gemexport.formats.gguf.container import Writer, read

    folder = tmp_path_factory.mktemp("gguf")
    model = demo.make(folder / "model", family="gemma3", size=demo.Size(512, 256, 512, 4, 2, 64, 32, 8), rule=None)
    plain = read(exporter.export(open_checkpoint(model), folder / "plain.gguf", variant="F32").path)
    stream = np.random.default_rng(7)
    matrices = 0
    with Writer(folder / "mixed.gguf", plain.packed, {name: item.shape for name, item in plain.tensors.items()}) as out:
        for name, item in plain.tensors.items():
            values = plain.rows(item, 0, item.nbytes // item.row_bytes).view("<f4")
            kind = gguf.GGMLQuantizationType[MIXED[matrices % len(MIXED)] if len(item.shape) == 2 else "F32"]
            matrices += len(item.shape) == 2
            if kind.name in K_FACTORS:
                data = _random_blocks(
                    item.shape[0], item.shape[1] // 256, gguf.GGML_QUANT_SIZES[kind][1], kind.name, stream
                )
            else:
                data = values if kind.name == "F32" else gguf.quants.quantize(values, kind)
            out.write(name, kind, data)
    return folder / "mixed.gguf"


def _random_blocks(rows: int, count: int, size: int, kind: str, stream: np.random.Generator) -> np.ndarray:
    data = stream.integers(0, 256, (rows, count, size), dtype=np.uint8)
    for place in K_FACTORS[kind]:
        factors = stream.uniform(1e-5, 1e-4, (rows, count)).astype("<f2")
        data[:, :, place : place + 2] = factors.view(np.uint8).reshape(rows, count, 2)
    return data


TwoLayers = Callable[..., Checkpoint]


@pytest.fixture(scope="session")
def two_layers() -> TwoLayers:
    """Makes a Gemma 4 of one sliding and one full layer in memory, random weights with one scale a row.

    With `wide` it has E2B's widths and the vocabulary that is asked for, else it is tiny.
    """

    def make(*, bits: int = 4, wide: bool = False, vocab: int = 256) -> Checkpoint:
        return demo.in_memory(two_layer_config(wide, vocab), bits)

    return make


def two_layer_config(wide: bool, vocab: int) -> dict[str, Any]:
    """Two of E2B's layers, or a small model of the same shape."""
    sizes = (1536, 6144, 8, 256, 512, 256, 512) if wide else (64, 128, 2, 32, 64, 32, 8)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "global_head_dim",
             "hidden_size_per_layer_input", "sliding_window")  # fmt: skip
    rope = {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    return dict(zip(names, sizes, strict=True)) | {
        "model_type": "gemma4_text", "num_hidden_layers": 2, "num_key_value_heads": 1, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": rope, "vocab_size": vocab,
        "vocab_size_per_layer_input": vocab, "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    }  # fmt: skip


@pytest.fixture(scope="session")
def golden() -> Path:
    """Small checkpoints that other people's libraries wrote (tests/golden/README.md). Do not write to it."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def damage() -> ModuleType:
    """benchmarks/damage.py: small files of every kind that is read, and what damages them."""
    path = Path(__file__).parents[1] / "benchmarks" / "damage.py"
    spec = importlib.util.spec_from_file_location("gemexport_damage", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
