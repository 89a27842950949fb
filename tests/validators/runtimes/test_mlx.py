"""mlx-lm takes an exported folder as it is, and set to f32 it is the reference model that holds the same numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemexport.exporters import mlx as exporter
from gemexport.formats import mlx
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.validators.checks import prompts, tokenizer
from gemexport.validators.checks.divergence import Divergence
from gemexport.validators.runtimes import mlx as adapter
from gemexport.validators.runtimes.pytorch import whole

pytest.importorskip("mlx_lm")


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def artefact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    checkpoint: Checkpoint = request.getfixturevalue(request.param)
    return checkpoint, exporter.export(checkpoint, tmp_path_factory.mktemp("mlx") / "4bit").path


def test_conversion(artefact: tuple[Checkpoint, Path]) -> None:
    checkpoint, folder = artefact
    encode = tokenizer.load(checkpoint.path / "tokenizer.json")
    texts = [encode(text) for text in prompts.prompts()]
    sequence = prompts.sequences(texts, checkpoint.architecture, 100)[0]
    runtime = adapter.load(folder, threads=2, context=256)
    expected = whole(checkpoint.text_config, mlx.tensors(folder), 2)
    try:
        found, total = runtime.logits(sequence), Divergence()
        total.add(expected.logits(sequence), found, sequence)
        assert total.kld_mean < 1e-9
        assert total.top1_agreement == 1.0
        # A few positions go through MLX's quantized product, many through unpacked matrices.
        np.testing.assert_allclose(runtime.logits(sequence[:4]), found[:4], atol=1e-4)
        assert runtime.greedy(sequence[:40], 32) == expected.greedy(sequence[:40], 32)
        compared = tokenizer.compare(encode, lambda text: runtime.tokenize(text) or [], prompts.HARD_TEXTS)
        assert compared.equal
        assert runtime.arithmetic == "f32"
    finally:
        runtime.close()


def test_tables_that_stay_in_their_file_give_the_same_numbers(artefact: tuple[Checkpoint, Path]) -> None:
    _, folder = artefact
    found = []
    for frugal in (False, True):
        runtime = adapter.load(folder, threads=1, context=64, frugal=frugal)
        found.append((runtime.logits([2, 7, 300, 7, 41]), runtime.greedy([2, 7, 300], 4)))
        runtime.close()
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.slow
def test_mlx_lm_needs_nothing_of_ours(artefact: tuple[Checkpoint, Path]) -> None:
    program = (
        "import sys, mlx.core as mx, mlx_lm\n"
        "mx.set_default_device(mx.cpu); mx.disable_compile()\n"
        "model, tokenizer = mlx_lm.load(sys.argv[1])\n"
        "print(len(mlx_lm.generate(model, tokenizer, 'Hello', max_tokens=5)))\n"
        "assert not any(name.startswith('gemexport') for name in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(artefact[1])]
    assert subprocess.run(command, check=True, capture_output=True, text=True, cwd=artefact[1]).stdout.strip()


def test_a_folder_that_does_not_load_is_explained(artefact: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    config = (artefact[1] / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("gemma3_text", "no_such").replace("gemma4_text", "no_such"))
    with pytest.raises(InputError, match="mlx-lm cannot load it"):
        adapter.load(tmp_path, threads=1, context=16)
