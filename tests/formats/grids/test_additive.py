"""The vector codec: what its codes mean, the search for them, the fit and what is kept of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.coreml import StackedCodes
from gemexport.formats.coreml.arrays import Palette, Stored
from gemexport.formats.gemma.names import PER_LAYER_EMBEDDING
from gemexport.formats.grids import additive_fit
from gemexport.formats.grids.additive import AdditiveTensor, Encoder, evaluate
from gemexport.formats.grids.vector_codec import Codec, parse, parse_all, stated_rms
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import ArrayTensor, Floats

pytest.importorskip("torch")
from gemexport.formats.grids import codebooks


def table(rows: int, width: int, seed: int = 0) -> Floats:
    """Rows of very different size, with a direction that vectors prefer."""
    generator = np.random.default_rng(seed)
    sizes = np.exp(generator.standard_normal((rows, 1)))
    values = generator.standard_normal((rows, width)) + np.resize([1.5, 0, 0, -1], width)
    return np.asarray(values * sizes * 0.02, np.float32)


def fitted(values: Floats, codec: Codec, block: int, folder: Path, threads: int | None = None) -> AdditiveTensor:
    folder.mkdir()
    additive_fit.write_fit(ArrayTensor("table", values), folder, codec, block, threads=threads)
    return additive_fit.read_fit(folder)


def error(values: Floats, tensor: AdditiveTensor) -> float:
    lost = values.astype(np.float64) - tensor.numpy()
    return float(np.sqrt(np.square(lost).sum() / np.square(values, dtype=np.float64).sum()))


@pytest.mark.parametrize(("text", "codec"), [("aqlm:2x8", (2, 8, 8)), ("aqlm:1x6:4", (1, 6, 4))])
def test_spelling(text: str, codec: tuple[int, int, int]) -> None:
    found = parse(text)
    assert (found.codebooks, found.bits, found.vector) == codec
    assert parse(str(found)) == found


def test_a_list_may_have_none_in_it() -> None:
    assert parse_all("none, aqlm:2x8") == (None, parse("aqlm:2x8"))
    assert parse_all("aqlm:1x8:4") == (Codec(codebooks=1, bits=8, vector=4),)


@pytest.mark.parametrize("text", ["", "aqlm", "aqlm:2", "aqlm:0x8", "aqlm:2x9", "aqlm:9x8", "aqlm:2x8:1", "rvq:2x8"])
def test_what_is_no_codec_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="aqlm:2x8"):
        parse(text)


def test_the_error_that_an_artefact_states_is_a_number() -> None:
    assert stated_rms(None, Path("x")) is None
    assert stated_rms("0.25", Path("x")) == 0.25
    for text in ("", "much", "nan", "-1", "inf"):
        with pytest.raises(InputError, match="error of its vector codec"):
            stated_rms(text, Path("x"))


@settings(deadline=None)  # the first call waits for the compiled loop
@given(st.data())
def test_evaluation_is_what_the_formula_says(data: st.DataObject) -> None:
    count, bits, vector = (data.draw(st.integers(*limits)) for limits in ((1, 4), (2, 5), (2, 5)))
    rows, blocks, per_block = (data.draw(st.integers(1, 4)) for _ in range(3))
    generator = np.random.default_rng(data.draw(st.integers(0, 1 << 20)))
    codes = generator.integers(0, 1 << bits, (rows, blocks * per_block, count), np.uint8)
    books = generator.standard_normal((count, 1 << bits, vector)).astype(np.float16).astype(np.float32)
    scales = generator.standard_normal((rows, blocks)).astype(np.float32)
    wanted = np.zeros((rows, blocks * per_block, vector))
    for m in range(count):
        wanted += books[m].astype(np.float64)[codes[:, :, m]]
    wanted = wanted.reshape(rows, blocks, -1) * scales[:, :, None].astype(np.float64)
    assert np.array_equal(evaluate(codes, books, scales), wanted.reshape(rows, -1))


@settings(deadline=None)
@given(st.data())
def test_palettes_of_vectors_are_codebooks(data: st.DataObject) -> None:
    """What Core ML's constexpr_lut_to_dense gives, added, is the sum of the codec; its indices are the codes."""
    count, bits, vector = data.draw(st.integers(1, 3)), data.draw(st.sampled_from((2, 3, 4, 6, 8))), 4
    rows, blocks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    generator = np.random.default_rng(data.draw(st.integers(0, 1 << 20)))
    codes = generator.integers(0, 1 << bits, (rows, 2 * blocks, count), np.uint8)
    books = generator.standard_normal((count, 1 << bits, vector)).astype(np.float16)
    scales = generator.standard_normal((rows, blocks)).astype(np.float16).astype(np.float32)
    palettes = [
        Palette(
            Stored(f"uint{bits}", codes.shape[:2], np.ascontiguousarray(codes[:, :, m])),
            Stored("fp16", (1, 1, 1 << bits, vector), books[m][None, None]),
            1,
        )
        for m in range(count)
    ]
    start = data.draw(st.integers(0, rows - 1))
    assert np.array_equal(StackedCodes(palettes)[start:rows], codes[start:])
    added = sum(palette.numpy().astype(np.float64) for palette in palettes)
    wanted = evaluate(codes, books.astype(np.float32), scales)
    assert np.array_equal(added * np.repeat(scales, wanted.shape[1] // blocks, axis=1), wanted)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.integers(2, 3), st.integers(0, 1 << 20))
def test_a_beam_of_everything_finds_the_nearest_sum(count: int, bits: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    books = generator.standard_normal((count, 1 << bits, 3)).astype(np.float32)
    vectors = generator.standard_normal((5, 3)).astype(np.float32)
    codes = Encoder(books, beam=(1 << bits) ** count)(vectors)
    for vector, found in zip(vectors, codes, strict=True):
        distances = {
            chosen: np.square(vector - sum(books[m, k] for m, k in enumerate(chosen))).sum()
            for chosen in product(range(1 << bits), repeat=count)
        }
        # Two sums may be as near as f32 can tell.
        assert distances[tuple(map(int, found))] == pytest.approx(min(distances.values()), rel=1e-4, abs=1e-5)


def test_a_wider_beam_is_no_worse_and_every_code_is_a_code() -> None:
    generator = np.random.default_rng(1)
    books = generator.standard_normal((3, 16, 4)).astype(np.float32)
    vectors = generator.standard_normal((500, 4)).astype(np.float32)

    def lost(beam: int) -> float:
        codes = Encoder(books, beam)(vectors)
        assert codes.max() < 16
        return float(np.square(vectors - sum(books[m][codes[:, m]] for m in range(3))).sum())

    assert lost(64) < lost(8) < lost(1)


def test_vectors_of_the_codebooks_come_back_exactly(tmp_path: Path) -> None:
    """As many different vectors as a codebook has: k-means finds them, and the scales are theirs."""
    generator = np.random.default_rng(2)
    signs = np.array(list(product((-1, 1), repeat=4)), np.float32)
    values = signs[generator.integers(0, 16, (64, 8))].reshape(64, 32) * np.float32(2.0**-5)
    tensor = fitted(values, parse("aqlm:1x4:4"), 16, tmp_path / "fit")
    assert np.array_equal(tensor.numpy(), values)
    assert tensor.fitted_rms == 0


def test_each_codebook_takes_error_away(tmp_path: Path) -> None:
    values = table(256, 64)
    errors = [fitted(values, parse(f"aqlm:{m}x4:4"), 32, tmp_path / str(m)).fitted_rms or 0 for m in range(1, 6)]
    assert all(after < 0.85 * before for before, after in pairwise(errors)), errors
    # The one of k-means alone is what a code of a bit a weight is good for on normal numbers.
    assert errors[0] < 0.65


def test_codes_and_codebooks_by_turns_beat_k_means_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = additive_fit.sample(ArrayTensor("table", table(256, 64)), parse("aqlm:3x4:4"), 32)
    together = codebooks.fit(vectors, parse("aqlm:3x4:4")).rms
    monkeypatch.setattr(codebooks, "ROUNDS", 0)
    assert together < codebooks.fit(vectors, parse("aqlm:3x4:4")).rms


def test_a_scale_for_each_block_pays(tmp_path: Path) -> None:
    """Blocks of one row that differ in size, as the parts of different layers do."""
    values = table(256, 64) * np.repeat(np.float32([1, 30]), 32)
    one = fitted(values, parse("aqlm:2x4:4"), 64, tmp_path / "row")
    two = fitted(values, parse("aqlm:2x4:4"), 32, tmp_path / "blocks")

    def small(tensor: AdditiveTensor) -> float:
        return float(np.square(values[:, :32] - tensor.numpy()[:, :32]).sum())

    assert small(two) < 0.2 * small(one)


def test_the_measured_error_is_that_of_the_values_read_back(tmp_path: Path) -> None:
    values = table(100, 48)
    tensor = fitted(values, parse("aqlm:2x6:8"), 24, tmp_path / "fit")
    assert tensor.fitted_rms == pytest.approx(error(values, tensor), rel=1e-12)
    assert tensor.shape == (100, 48)
    assert parse("aqlm:2x6:8").nbytes(100, 48, 24) == 100 * 6 * 2 * 6 // 8 + 2 * 64 * 8 * 2 + 100 * 2 * 2


def test_the_same_table_gives_the_same_bytes_whatever_the_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, codec = table(300, 64), parse("aqlm:2x5:4")
    fitted(values, codec, 32, tmp_path / "one", threads=1)
    slices = additive_fit.slices
    monkeypatch.setattr(additive_fit, "slices", lambda tensor, _: slices(tensor, 7 * 4 * 64))
    fitted(values, codec, 32, tmp_path / "two", threads=2)
    for name in (additive_fit.CODES, additive_fit.SCALES, additive_fit.CODEBOOKS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_empty_rows_and_numbers_that_f16_does_not_hold(tmp_path: Path) -> None:
    values = table(64, 32)
    values[5] = 0
    tensor = fitted(values, parse("aqlm:2x4:4"), 32, tmp_path / "halves")
    assert not tensor.numpy()[5].any()
    assert tensor.grid.scale_dtype == "f16"
    small = fitted(values * np.float32(1e-6), parse("aqlm:2x4:4"), 32, tmp_path / "small")
    assert small.grid.scale_dtype == "f32"
    assert small.fitted_rms == pytest.approx(tensor.fitted_rms, rel=1e-3)
    nothing = fitted(np.zeros((4, 8), np.float32), parse("aqlm:2x4:4"), 8, tmp_path / "nothing")
    assert not nothing.numpy().any()


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3))
def test_tables_smaller_than_a_codebook(
    tmp_path_factory: pytest.TempPathFactory, rows: int, blocks: int, m: int
) -> None:
    folder = tmp_path_factory.mktemp("fits") / "fit"
    values = table(rows, 8 * blocks)
    tensor = fitted(values, Codec(codebooks=m, bits=6, vector=4), 8, folder)
    assert error(values, tensor) < 0.02


def test_a_fit_is_kept_and_made_again_for_another_checkpoint(tiny_gemma4: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma4)
    codec = parse("aqlm:1x4")
    seen: list[int] = []
    first = additive_fit.find_codec(checkpoint, tmp_path / "fit", codec, seen.append)
    changed = (tmp_path / "fit" / additive_fit.CODES).stat().st_mtime_ns
    assert additive_fit.find_codec(checkpoint, tmp_path / "fit", codec) == first
    assert (tmp_path / "fit" / additive_fit.CODES).stat().st_mtime_ns == changed
    assert sum(seen) == first.shape[0] * first.shape[1]
    assert additive_fit.find_codec(checkpoint, tmp_path / "fit", parse("aqlm:1x5")).codec.bits == 5
    found = additive_fit.attach(checkpoint, tmp_path / "fit").tensors[PER_LAYER_EMBEDDING]
    # A scale for each layer's part of a row.
    assert found.rows(0, first.shape[0]).grid()[1].shape == (first.shape[0], len(checkpoint.architecture.layers))


def test_what_cannot_be_coded_is_said(tiny_gemma3: Path, tiny_gemma4: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no per-layer embeddings"):
        additive_fit.find_codec(open_checkpoint(tiny_gemma3), tmp_path / "fit", parse("aqlm:2x8"))
    with pytest.raises(InputError, match="do not divide"):
        additive_fit.find_codec(open_checkpoint(tiny_gemma4), tmp_path / "fit", parse("aqlm:2x8:24"))
    with pytest.raises(InputError, match="--fresh"):
        additive_fit.attach(replace(open_checkpoint(tiny_gemma4)), tmp_path / "fit")


def test_arrays_that_do_not_fit_together_are_refused() -> None:
    codec = parse("aqlm:2x3:4")
    codes, books = np.zeros((5, 6, 2), np.uint8), np.zeros((2, 8, 4), np.float32)
    scales = np.ones((5, 3), np.float16)
    assert AdditiveTensor("w", codec, codes, books, scales).grid.block == 8
    for broken in (
        (codes[:, :, :1], books, scales),
        (codes[:4], books, scales),
        (codes, books[:, :7], scales),
        (codes, books, np.ones((5, 4), np.float16)),
        (codes, books, np.ones((5, 0), np.float16)),
    ):
        with pytest.raises(InputError, match="again"):
            AdditiveTensor("w", codec, *broken)
    codes[3, 2, 1] = 8
    with pytest.raises(InputError, match="in no codebook"):
        AdditiveTensor("w", codec, codes, books, scales).numpy()
