"""K-quants: the mixes against tables that llama-quantize printed, the bytes against those that it wrote.

The files in data/ come from llama-quantize of llama.cpp 0.5.0-dev (ggml 0.25.3, the sources in llama-cpp-python 0.3.36,
built by gcc 12 for x86-64). The tables of types are what `llama-quantize --dry-run` says about a file of these shapes:
Gemma 3 270M, Gemma 4 E2B, and a decoder made up of what neither has. `demo-digests.tsv` holds, for a plain demo model,
the type of each matrix and the first 12 digits of the SHA-256 of its bytes.
"""

from __future__ import annotations

import csv
import hashlib
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import LlamaFileType
from gguf.quants import dequantize

from gemexport import demo
from gemexport.exporters import gguf as exporter
from gemexport.exporters.gguf.mix import MIXES, types
from gemexport.formats import gguf
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.gemma.architecture import TensorSpec
from gemexport.formats.gemma.families import named
from gemexport.formats.gemma.names import CANONICAL
from gemexport.formats.gguf.container import Writer, float32, read, string, uint32
from gemexport.formats.gguf.quantizer import quantize
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import ArrayTensor
from gemexport.validators.checks.weights import compare

DATA = Path(__file__).parent / "data"
# Elsewhere a compiler may contract a * b + c, which moves some codes: identical bytes are a matter of one platform.
x86_64 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the bytes were made on x86-64")


def _table(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(encoding="ascii", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Gemma 4 with rows of 64, 256 and 512 weights that lie on no lattice."""
    return open_checkpoint(demo.make(tmp_path_factory.mktemp("plain") / "demo", rule=None))


def _importance(width: int) -> np.ndarray:
    return (1 + np.arange(width) * 7919 % 1009 / 8).astype(np.float32)


def _imatrix(path: Path, widths: dict[str, int]) -> Path:
    """A file as llama-imatrix writes it, its importances `_importance`."""
    tensors = {}
    for name, width in widths.items():
        tensors |= {f"{name}.in_sum2": 4 * _importance(width)[None], f"{name}.counts": np.float32([[4]])}
    metadata = {"general.type": string("imatrix"), "imatrix.chunk_count": uint32(2)}
    with Writer(path, metadata, {name: values.shape for name, values in tensors.items()}) as out:
        for name, values in tensors.items():
            out.write(name, Type.F32, values)
    return path


@pytest.mark.parametrize("variant", MIXES)
@pytest.mark.parametrize(("table", "layers"), [("gemma3-270m", 18), ("gemma4-e2b", 35), ("made-up", 18)])
def test_the_mix_is_llama_cpps(table: str, layers: int, variant: str) -> None:
    rows = _table(f"{table}.tsv")
    shapes: dict[str, tuple[int, ...]] = {row["name"]: (int(row["out"]), int(row["in"])) for row in rows}
    norms: dict[str, tuple[int, ...]] = {"output_norm.weight": (640,), "blk.0.layer_output_scale.weight": (1,)}
    places = {file: CANONICAL.find(name) for name, file in gguf.file_names(named("gemma4"), layers).items()}
    specs = {name: TensorSpec(name, shape, *places[name]) for name, shape in (shapes | norms).items()}
    found = types(MIXES[variant], specs, layers)
    assert {name: kind.name for name, kind in found.items()} == {
        row["name"]: row[variant] for row in rows if row[variant] != "BF16"
    }


def test_the_tables_show_every_rule() -> None:
    """A table without fallbacks, untied heads or matrices that stay would prove little."""
    made_up = {row["name"]: row["Q4_K_M"] for row in _table("made-up.tsv")}
    assert made_up["output.weight"] == "Q8_0" != made_up["token_embd.weight"]
    assert set(made_up.values()) == {"Q4_K", "Q6_K", "Q5_0", "Q8_0", "F16", "BF16"}
    assert "blk.1.attn_v.weight" not in made_up


@x86_64
@pytest.mark.parametrize("column", list(_table("demo-digests.tsv")[0])[1:])
def test_the_bytes_are_llama_quantizes(column: str, plain: Checkpoint, tmp_path: Path) -> None:
    variant, *weighted = column.split()
    imatrix = None
    if weighted:
        names = gguf.file_names(plain.model.family, len(plain.architecture.layers))
        widths = {names[name]: item.shape[1] for name, item in plain.tensors.items() if len(item.shape) == 2}
        imatrix = _imatrix(tmp_path / "i.gguf", {n: width for n, width in widths.items() if "token_embd" not in n})
    path = exporter.export(plain, tmp_path / "model.gguf", variant=variant, imatrix=imatrix).path
    container = read(path)
    assert container.metadata["general.file_type"] == LlamaFileType[f"MOSTLY_{variant}"]
    found = {}
    for name, item in container.tensors.items():
        if len(item.shape) == 2:
            data = container.rows(item, 0, item.shape[0]).tobytes()
            found[name] = f"{item.type.name} {hashlib.sha256(data).hexdigest()[:12]}"
    assert found == {row["name"]: row[column] for row in _table("demo-digests.tsv")}


def test_slices_and_threads_do_not_show(plain: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "slices", lambda tensor: [(i, i + 32) for i in range(0, tensor.shape[0], 32)])
    container = read(exporter.export(plain, tmp_path / "model.gguf", variant="Q4_K_M").path)
    names = gguf.file_names(plain.model.family, len(plain.architecture.layers))
    quantized = 0
    for name, tensor in plain.tensors.items():
        item = container.tensors[names[name]]
        if len(item.shape) == 2 and item.type != Type.BF16:
            assert np.array_equal(container.rows(item, 0, item.shape[0]), quantize(item.type, tensor.numpy()))
            quantized += 1
    assert quantized == 68


def test_what_is_left_or_replaced_is_told(tmp_path: Path, gemma4: Checkpoint) -> None:
    """Rows of 64 and 96 weights and none of 256; every matrix lies on a lattice."""
    path = tmp_path / "model.gguf"
    result = exporter.export(gemma4, path, variant="Q4_K_M")
    kinds = {item.type for item in read(path).tensors.values() if len(item.shape) == 2}
    assert kinds == {Type.Q5_0, Type.Q6_K, Type.Q8_0, Type.BF16}
    left, others = result.notes
    assert "68 matrices left their lattice" in left
    assert "no multiple of 256" in others
    judged = {item.name: item for item in compare(gemma4.tensors, gguf.tensors(path)).tensors}
    assert not judged["model.per_layer_model_projection.weight"].requantized
    assert judged["model.per_layer_model_projection.weight"].exact_fraction == 1
    assert judged["model.layers.0.self_attn.q_proj.weight"].requantized
    assert 0 < judged["model.layers.0.self_attn.q_proj.weight"].rms_relative_error < 0.06
    assert not judged["model.norm.weight"].requantized


def test_the_same_input_gives_the_same_bytes(plain: Checkpoint, tmp_path: Path) -> None:
    files = [exporter.export(plain, tmp_path / name, variant="Q6_K").path for name in ("first.gguf", "second.gguf")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_odd_width_becomes_f16_and_may_lose(tiny_gemma3: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((512, 48)).astype(np.float32) * np.float32(1e-6)
    path = _with(tiny_gemma3, tmp_path, ArrayTensor("model.embed_tokens.weight", values, "f32"))
    assert read(path).tensors["token_embd.weight"].type == Type.F16
    stored = gguf.tensors(path)["model.embed_tokens.weight"]
    assert np.array_equal(stored.numpy(), values.astype(np.float16).astype(np.float32))
    assert stored.requantized


def test_weights_beyond_the_type_are_an_error_that_names_the_tensor(tiny_gemma3: Path, tmp_path: Path) -> None:
    values = np.full((512, 64), 1e30, np.float32)
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight has weights that are not finite or too large"):
        _with(tiny_gemma3, tmp_path, ArrayTensor("model.embed_tokens.weight", values, "f32"))
    assert list(tmp_path.iterdir()) == []


def _with(model: Path, folder: Path, tensor: ArrayTensor) -> Path:
    checkpoint = open_checkpoint(model)
    changed = replace(checkpoint, tensors={**checkpoint.tensors, tensor.name: tensor})
    return exporter.export(changed, folder / "model.gguf", variant="Q4_K_M").path


def test_importances_are_told_in_notes_and_metadata(plain: Checkpoint, tmp_path: Path) -> None:
    imatrix = _imatrix(tmp_path / "some.gguf", {"blk.0.attn_q.weight": 256, "token_embd.weight": 2048})
    path = tmp_path / "model.gguf"
    result = exporter.export(plain, path, variant="Q6_K", imatrix=imatrix)
    # token_embd has as many importances as rows: llama-quantize passes over that too.
    assert result.notes[-1].startswith("some.gguf has no importances for 67 matrices (token_embd.weight, ")
    metadata = read(path).metadata
    assert metadata["quantize.imatrix.file"] == "some.gguf"
    assert (metadata["quantize.imatrix.entries_count"], metadata["quantize.imatrix.chunks_count"]) == (2, 2)


def test_importances_of_another_model_are_refused(plain: Checkpoint, tmp_path: Path) -> None:
    imatrix = _imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": 128})
    with pytest.raises(InputError, match=r"128 importances for blk\.0\.attn_q\.weight, whose rows have 256"):
        exporter.export(plain, tmp_path / "model.gguf", variant="Q6_K", imatrix=imatrix)
    with pytest.raises(InputError, match="is for K-quants, and Q4_0"):
        exporter.export(plain, tmp_path / "model.gguf", imatrix=imatrix)
    assert [item.name for item in tmp_path.iterdir()] == ["i.gguf"]


def test_only_files_that_say_so_were_quantized_anew(tmp_path: Path) -> None:
    """Somebody's Q4_0 file could have held the lattice; a file type that is no number says nothing."""
    data = quantize(Type.Q5_0, np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32))
    for said, expected in (
        (uint32(LlamaFileType.MOSTLY_Q3_K_M), True),
        (uint32(LlamaFileType.MOSTLY_IQ4_XS), True),
        (uint32(LlamaFileType.MOSTLY_Q4_0), False),
        (uint32(LlamaFileType.MOSTLY_Q5_0), False),
        (uint32([15]), False),
        (float32(15.0), False),
    ):
        metadata = {
            "general.architecture": string("gemma3"),
            "gemma3.block_count": uint32(1),
            "general.file_type": said,
        }
        with Writer(tmp_path / "model.gguf", metadata, {"token_embd.weight": (4, 32)}) as out:
            out.write("token_embd.weight", Type.Q5_0, data)
        (tensor,) = gguf.tensors(tmp_path / "model.gguf").values()
        assert tensor.requantized is expected, said
        assert np.array_equal(tensor.numpy(), dequantize(data, Type.Q5_0))
