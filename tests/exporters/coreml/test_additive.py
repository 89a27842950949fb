"""Per-layer embeddings in the vector codec, in Core ML: palettes of vectors, read back and computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.coreml import CODEBOOK, CODEC, stored_name, tensors
from gemexport.formats.coreml.package import open_package
from gemexport.formats.gemma.names import PER_LAYER_EMBEDDING
from gemexport.formats.grids import additive_fit
from gemexport.formats.grids.vector_codec import parse
from gemexport.formats.storage.errors import InputError

ct = pytest.importorskip("coremltools")
pytest.importorskip("torch")
from gemexport.exporters import coreml  # noqa: E402
from gemexport.validators.checks.divergence import Divergence  # noqa: E402
from gemexport.validators.reference import reference  # noqa: E402
from gemexport.validators.runtimes.coreml import Program, load  # noqa: E402

NAME = PER_LAYER_EMBEDDING
TOKENS = [2, *np.random.default_rng(5).integers(3, 200, 40).tolist()]


@pytest.fixture(scope="module", params=["aqlm:2x8", "aqlm:3x5:4"])
def coded(request: pytest.FixtureRequest, gemma4: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny Gemma 4 with its per-layer embeddings in a codec."""
    folder = tmp_path_factory.mktemp("work")
    additive_fit.find_codec(gemma4, folder / "codec", parse(request.param))
    return additive_fit.attach(gemma4, folder / "codec")


@pytest.fixture(scope="module")
def package(coded: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coreml.export(coded, tmp_path_factory.mktemp("packages") / "int4.mlpackage", context=128).path


def test_codes_codebooks_and_scales_come_back(coded: Checkpoint, package: Path) -> None:
    found, wanted = tensors(package), coded.tensors[NAME]
    assert set(found) == set(coded.tensors)
    stored = found[NAME]
    assert (stored.shape, stored.grid, stored.fitted_rms) == (wanted.shape, wanted.grid, wanted.fitted_rms)
    assert stored.grid is not None
    assert stored.grid.kind == "vectors"
    for start, stop in ((0, wanted.shape[0]), (3, 8)):
        ours, theirs = wanted.rows(start, stop), stored.rows(start, stop)
        for one, other in ((ours.codes, theirs.codes), (ours.scales, theirs.scales), (ours.values, theirs.values)):
            assert one is not None
            assert np.array_equal(one, other)


def test_a_palette_is_one_constant_of_vectors_along_the_rows(coded: Checkpoint, package: Path) -> None:
    wanted = coded.tensors[NAME]
    assert wanted.grid is not None
    made = [
        operation
        for operation in open_package(package).operations
        if operation.type == "constexpr_lut_to_dense" and CODEBOOK in operation.outputs[0].name
    ]
    assert len(made) == wanted.grid.codebooks
    for operation in made:
        sizes = [item.constant.size for item in operation.outputs[0].type.tensorType.dimensions]
        assert tuple(sizes) == wanted.shape


def test_the_program_computes_the_model_that_it_holds(coded: Checkpoint, package: Path) -> None:
    wanted = reference(coded.text_config, tensors(package), 1).logits(TOKENS)
    for arithmetic, limit in (("f32", 1e-6), ("f16", 1e-3)):
        total = Divergence()
        total.add(wanted, load(package, threads=1, context=128, arithmetic=arithmetic).logits(TOKENS), TOKENS)
        assert total.kld_mean < limit


def test_the_same_codes_give_the_same_bytes_and_coremltools_reads_them(
    coded: Checkpoint, package: Path, tmp_path: Path
) -> None:
    again = coreml.export(coded, tmp_path / "int4.mlpackage", context=128).path
    files = [sorted(path for path in folder.rglob("*") if path.is_file()) for folder in (package, again)]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    # Its own checks of shapes and types, when the protobuf becomes a program again.
    from coremltools.converters.mil.frontend.milproto.load import load as load_milproto

    spec = ct.utils.load_spec(str(package))
    weights = package / "Data" / "com.apple.CoreML" / "weights"
    program = load_milproto(spec, spec.specificationVersion, file_weights_dir=str(weights))
    assert "main" in program.functions


def test_a_package_that_lacks_a_palette_is_refused(coded: Checkpoint, package: Path) -> None:
    opened = open_package(package)
    opened.model.description.metadata.userDefined[f"{CODEC}{stored_name(NAME)}"] = "aqlm:7x8:4"
    model = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    before = model.read_bytes()
    model.write_bytes(opened.model.SerializeToString())
    try:
        with pytest.raises(InputError, match="not in the vector codec aqlm:7x8:4"):
            tensors(package)
    finally:
        model.write_bytes(before)
    assert Program(package).inputs
