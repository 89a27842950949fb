"""A GGUF file as a checkpoint: what our exporter wrote is the model it came from, in one file or in several."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import Keys
from samples import with_grids
from tokenizers import Tokenizer

from gemexport import demo
from gemexport.exporters import gguf as exporter
from gemexport.exporters.gguf.facts import metadata
from gemexport.exporters.gguf.tokenizer import tokenizer
from gemexport.formats.checkpoint import Checkpoint, checkpoint_name, is_gguf, open_checkpoint
from gemexport.formats.gemma.architecture import Architecture
from gemexport.formats.gemma.model import describe
from gemexport.formats.gguf.container import Value, Writer, boolean, float32, int32, read, string, uint32
from gemexport.formats.gguf.vocabulary import Vocabulary, sentencepiece_merges
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import LOCK
from gemexport.validators.checks import prompts

SOURCES = {
    "gemma3": {"family": "gemma3"},
    "gemma3 in a multimodal one": {"family": "gemma3", "wrapped": True},
    "gemma4": {},
    "gemma3n": {"family": "gemma3n"},
    "gemma4 in the new spelling": {"spelling": "per_layer_config"},
}


def exported(model: Path, folder: Path, variant: str = "Q4_0") -> Path:
    return exporter.export(with_grids(model, folder / "grids"), folder / f"{model.name}.gguf", variant=variant).path


@pytest.fixture(scope="module")
def gemma3(tiny_gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_gemma3, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def gemma4(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_gemma4, tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("variant", ["Q4_0", "BF16"])
def test_the_model_comes_back(source: str, variant: str, tmp_path: Path) -> None:
    model = demo.make(tmp_path / "model", size="tiny", **SOURCES[source])
    expected, found = open_checkpoint(model), open_checkpoint(exported(model, tmp_path, variant))
    assert found.architecture == expected.architecture
    assert list(found.tensors) == list(expected.tensors)
    assert found.left_out == ()
    assert found.nbytes() == found.path.stat().st_size
    for name, tensor in expected.tensors.items():
        # 1 + w in float32 loses the last bits of a norm's small w.
        difference = np.abs(found.tensors[name].numpy().astype(np.float64) - tensor.numpy())
        limit = 0.004 * np.abs(tensor.numpy()) if len(tensor.shape) == 2 else 2.0**-24
        assert (difference <= limit).all(), name


@pytest.mark.parametrize(
    "change",
    [
        {"query_pre_attn_scalar": 168},
        {"query_pre_attn_scalar": 37.25},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
        {"layer_types": ["full_attention"] * 6, "sliding_window": 4096},
        {"final_logit_softcapping": 12.5, "rms_norm_eps": 1e-5, "rope_theta": 12345.0, "rope_local_base_freq": 777.0},
        {"eos_token_id": [1, 5, 6], "bos_token_id": 2},
    ],
)
def test_a_gemma3_of_other_numbers_comes_back(change: dict[str, object], tmp_path: Path) -> None:
    model = demo.make(tmp_path / "model", family="gemma3", size="tiny")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    expected = open_checkpoint(model).architecture
    assert same_but_for_rounding(open_checkpoint(exported(model, tmp_path)).architecture, expected)


def same_but_for_rounding(found: Architecture, expected: Architecture) -> bool:
    """The attention scale may be off by the rounding of the factor that is in the file, a float32."""
    assert found.attention_scale == pytest.approx(expected.attention_scale, rel=2**-24)
    return found.model_copy(update={"attention_scale": expected.attention_scale}) == expected


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("same", [True, False])
def test_a_gemma4_of_other_heads_comes_back(same: bool, heads: int, tmp_path: Path) -> None:
    """Full layers with key/value heads of their own, with values that are keys, and without what E2B has."""
    model = demo.make(tmp_path / "model", size="tiny")
    config = json.loads((model / "config.json").read_text())
    full = [index for index, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    changed = config | {
        "attention_k_eq_v": same, "num_key_value_heads": 1, "num_kv_shared_layers": 0, "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0, "final_logit_softcapping": None,
    }  # fmt: skip
    del changed["global_head_dim"], changed["num_global_key_value_heads"]
    own = {"head_dim": 64, "num_key_value_heads": heads}
    changed["per_layer_config"] = {str(index): own for index in full}
    path = written(changed, open_checkpoint(model), tmp_path / "model.gguf")
    assert open_checkpoint(path).architecture == read_architecture(changed)


def read_architecture(config: dict[str, object]) -> Architecture:
    return describe(config, "config.json").decoder


def written(config: dict[str, object], source: Checkpoint, path: Path, **changes: Value | None) -> Path:
    """A GGUF file of a decoder with zeros for weights and the tokenizer of `source`; `changes` None takes a key out."""
    from gemexport.exporters.gguf.facts import rope_frequencies
    from gemexport.formats.gguf import ROPE_FREQUENCIES, file_names

    model = describe(config, "config.json")
    tokens, _ = tokenizer(replace(source, model=model))
    values = {**metadata(model, "model", "F32"), **tokens, **changes}
    names = file_names(model.family, len(model.decoder.layers))
    arrays = {names[name]: np.zeros(spec.shape, np.float32) for name, spec in model.specs.items()}
    frequencies = rope_frequencies(model)
    if frequencies is not None:
        arrays[ROPE_FREQUENCIES] = frequencies
    kept = {key: value for key, value in values.items() if value is not None}
    with Writer(path, kept, {name: array.shape for name, array in arrays.items()}) as out:
        for name, array in arrays.items():
            out.write(name, Type.F32, array)
    return path


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_the_tokenizer_comes_back(family: str, request: pytest.FixtureRequest) -> None:
    before = open_checkpoint(request.getfixturevalue(f"tiny_{family}"))
    after = open_checkpoint(request.getfixturevalue(family))
    theirs, ours = (Tokenizer.from_file(str(item.assets / "tokenizer.json")) for item in (before, after))
    assert ours.get_vocab() == theirs.get_vocab()
    choose = random.Random(1)
    characters = "".join(prompts.prompts()) + " \n\t▁<>" * 40
    texts = ["".join(choose.choices(characters, k=choose.randint(1, 60))) for _ in range(1500)]
    pieces = list(theirs.get_vocab())
    texts += ["".join(choose.choices(pieces, k=choose.randint(1, 8))) for _ in range(1500)]
    texts += [character * count for character in " \n▁=a" for count in range(1, 40)]
    for text in [*prompts.HARD_TEXTS, *prompts.prompts(), *texts]:
        assert ours.encode(text).ids == theirs.encode(text).ids, text
        ids = theirs.encode(text).ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False), text
    settings = [json.loads((item.assets / "tokenizer_config.json").read_text()) for item in (before, after)]
    for key in ("add_bos_token", "bos_token", "eos_token", "pad_token", "unk_token", "tokenizer_class", "padding_side"):
        assert settings[1][key] == settings[0][key]
    assert (after.assets / "chat_template.jinja").read_text("utf-8") == settings[0]["chat_template"]
    generation = [json.loads((item.assets / "generation_config.json").read_text()) for item in (before, after)]
    assert generation[1] == generation[0]


def test_a_second_export_is_the_same_file(gemma4: Path, tmp_path: Path) -> None:
    """Out of the file, into a file: names, metadata and tensor data are the same bytes, but for the model's name."""
    checkpoint = open_checkpoint(gemma4, tmp_path / "scratch")
    again = exporter.export(with_grids(checkpoint, tmp_path / "grids"), tmp_path / "again.gguf").path
    assert checkpoint.name == checkpoint_name(gemma4)
    assert again.read_bytes() == gemma4.read_bytes()


def test_merges_come_in_the_order_of_hugging_faces_converter() -> None:
    """Best score first, of one score the longer first half; symbols that users define come before all others."""
    texts = ["a", "b", "ab", "aba", "ba", "\n", "\n\n", "\n\n\n", "<0x41>", "▁"]
    kinds = [1, 1, 1, 1, 1, 4, 4, 4, 6, 1]
    scores = [-9.0, -9.0, -1.0, -3.0, -2.0, -1000.0, -1000.0, -1000.0, 0.0, -9.0]
    assert sentencepiece_merges(Vocabulary(texts, kinds), scores) == [
        ("\n\n", "\n"),
        ("\n", "\n\n"),
        ("\n", "\n"),
        ("a", "b"),
        ("b", "a"),
        ("ab", "a"),
        ("a", "ba"),
    ]


def rewritten(path: Path, target: Path, **changes: Value | None) -> Path:
    """A copy of a GGUF file with other metadata, dots in the keys written as double underscores; None removes one."""
    source = read(path)
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    kept = {key: as_value(value) for key, value in source.metadata.items() if key not in keys}
    values = kept | {key: value for key, value in keys.items() if value is not None}
    with Writer(target, values, {name: item.shape for name, item in source.tensors.items()}) as out:
        for name, item in source.tensors.items():
            out.write(name, item.type, source.rows(item, 0, item.nbytes // item.row_bytes))
    return target


def as_value(value: object) -> Value:
    """What was read, to be written again."""
    if isinstance(value, np.ndarray):
        return {"f": float32, "i": int32, "u": uint32, "b": boolean}[value.dtype.kind](value.tolist())
    if isinstance(value, (bool, str)):
        return (boolean if isinstance(value, bool) else string)(value)
    if isinstance(value, (int, float)):
        return (uint32 if isinstance(value, int) else float32)(value)
    return string(list(value))


def test_what_llama_cpps_converter_writes_is_read(gemma3: Path, tiny_gemma3: Path, tmp_path: Path) -> None:
    """Runs of spaces as such, symbols with scores of -1000, no pattern where it is the usual one, no list of stops."""
    source = read(gemma3)
    tokens = list(source.metadata["tokenizer.ggml.tokens"])
    kinds, scores = source.metadata["tokenizer.ggml.token_type"].tolist(), source.metadata["tokenizer.ggml.scores"]
    spaces = [len(text) > 1 and not text.strip("▁") for text in tokens]
    changed = [" " * len(text) if space else text for text, space in zip(tokens, spaces, strict=True)]
    kinds = [4 if space else kind for kind, space in zip(kinds, spaces, strict=True)]
    lowered = [-1000.0 if kind in (3, 4) else score for kind, score in zip(kinds, scores.tolist(), strict=True)]
    path = rewritten(
        gemma3, tmp_path / "theirs.gguf",
        tokenizer__ggml__tokens=string(changed), tokenizer__ggml__token_type=int32(kinds),
        tokenizer__ggml__scores=float32(lowered), gemexport__eos_token_ids=None,
    )  # fmt: skip
    theirs = Tokenizer.from_file(str(tiny_gemma3 / "tokenizer.json"))
    ours = Tokenizer.from_file(str(open_checkpoint(path).assets / "tokenizer.json"))
    # Of runs longer than the longest token the file no longer tells how this tokenizer, not SentencePiece's, cuts them.
    for text in [*prompts.HARD_TEXTS, *prompts.prompts(), " " * 8, "\n" * 8, "a   b\n\n\nc"]:
        assert ours.encode(text).ids == theirs.encode(text).ids


def test_what_ollamas_converter_calls_the_bases_of_rope_is_read(gemma3: Path, tmp_path: Path) -> None:
    changes = {
        "gemma3__rope__freq_base": None, "gemma3__rope__freq_base_swa": None,
        "gemma3__rope__global__freq_base": float32(5e5), "gemma3__rope__local__freq_base": float32(2e4),
    }  # fmt: skip
    found = open_checkpoint(rewritten(gemma3, tmp_path / "ollama.gguf", **changes)).architecture
    assert {(layer.sliding, layer.rope.theta) for layer in found.layers} == {(True, 2e4), (False, 5e5)}


def test_the_end_of_a_turn_is_known_by_its_text_in_a_chat_model(gemma3: Path, tmp_path: Path) -> None:
    tokens = list(read(gemma3).metadata["tokenizer.ggml.tokens"])
    turn_end = tokens.index("<end_of_turn>")
    bare = {"gemexport__eos_token_ids": None, "tokenizer__ggml__eot_token_id": None}
    chat = rewritten(gemma3, tmp_path / "chat.gguf", tokenizer__ggml__eos_token_id=uint32(1), **bare)
    assert open_checkpoint(chat).architecture.eos_token_ids == (1, turn_end)
    base = rewritten(
        gemma3, tmp_path / "base.gguf", tokenizer__ggml__eos_token_id=uint32(1), tokenizer__chat_template=None, **bare
    )
    assert open_checkpoint(base).architecture.eos_token_ids == (1,)


def test_a_prefix_of_a_space_is_kept(gemma3: Path, tmp_path: Path) -> None:
    """As llama.cpp has it: before the text and after each special token."""
    path = rewritten(gemma3, tmp_path / "prefix.gguf", tokenizer__ggml__add_space_prefix=boolean(True))
    found = Tokenizer.from_file(str(open_checkpoint(path).assets / "tokenizer.json"))
    plain = Tokenizer.from_file(str(open_checkpoint(gemma3).assets / "tokenizer.json"))
    assert found.encode("a word").ids == plain.encode(" a word").ids
    assert found.encode("a<eos>b").ids == plain.encode(" a<eos> b").ids
    assert found.decode(found.encode("a word").ids) == "a word"


def test_named_chat_templates_come_back(gemma4: Path, tmp_path: Path) -> None:
    templates = {
        "tokenizer__chat_templates": string(["tools", "odd {name}"]),
        "tokenizer__chat_template.tools": string("T"),
        "tokenizer__chat_template.odd {name}": string("O"),
    }
    path = rewritten(gemma4, tmp_path / "named.gguf", tokenizer__chat_template=string("D"), **templates)
    assets = open_checkpoint(path).assets
    settings = json.loads((assets / "tokenizer_config.json").read_text())
    assert {item["name"]: item["template"] for item in settings["chat_template"]} == {
        "default": "D",
        "tools": "T",
        "odd {name}": "O",
    }
    assert not (assets / "chat_template.jinja").exists()


def split(path: Path, folder: Path, count: int) -> list[Path]:
    """A GGUF file in parts, as llama.cpp's gguf-split makes them: all metadata in the first."""
    source = read(path)
    names = list(source.tensors)
    common = {
        Keys.Split.LLM_KV_SPLIT_COUNT: uint32(count),
        Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: int32(len(names)),
    }
    paths = []
    for index in range(count):
        values = {key: as_value(value) for key, value in source.metadata.items()} if index == 0 else {}
        values |= common | {Keys.Split.LLM_KV_SPLIT_NO: uint32(index)}
        own = names[index::count]
        paths.append(folder / f"model-{index + 1:05}-of-{count:05}.gguf")
        with Writer(paths[-1], values, {name: source.tensors[name].shape for name in own}) as out:
            for name in own:
                item = source.tensors[name]
                out.write(name, item.type, source.rows(item, 0, item.nbytes // item.row_bytes))
    return paths


def test_parts_are_one_model(gemma4: Path, tmp_path: Path) -> None:
    parts = split(gemma4, tmp_path, 3)
    whole = open_checkpoint(gemma4)
    for path in parts[:2]:
        found = open_checkpoint(path)
        assert found.name == "model"
        assert found.files == tuple(parts)
        assert found.nbytes() == sum(part.stat().st_size for part in parts)
        assert found.architecture == whole.architecture
        for name, tensor in whole.tensors.items():
            assert np.array_equal(found.tensors[name].numpy(), tensor.numpy())


def test_a_file_that_gguf_split_merged_is_read(gemma3: Path, tmp_path: Path) -> None:
    """It has the keys of the first part, with 0 for the count of parts."""
    changes = {"split__count": uint32(0), "split__no": uint32(0), "split__tensors__count": int32(7)}
    merged = open_checkpoint(rewritten(gemma3, tmp_path / "merged.gguf", **changes))
    assert merged.architecture == open_checkpoint(gemma3).architecture
    assert merged.files == (tmp_path / "merged.gguf",)


def test_parts_that_do_not_belong_together_are_refused(gemma4: Path, gemma3: Path, tmp_path: Path) -> None:
    parts = split(gemma4, tmp_path, 3)
    whole = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(InputError, match="is missing, one of 3 parts"):
        open_checkpoint(parts[0])
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(InputError, match="is not part 2 of 3"):
        open_checkpoint(parts[0])
    parts[1].write_bytes(whole)
    alone = tmp_path / "renamed.gguf"
    alone.write_bytes(parts[0].read_bytes())
    with pytest.raises(InputError, match="is one of 3 parts of a model, but is not called so"):
        open_checkpoint(alone)


def test_files_are_unpacked_once_and_anew_for_another_model(gemma3: Path, gemma4: Path, tmp_path: Path) -> None:
    scratch, model = tmp_path / "work" / "source", tmp_path / "model.gguf"
    model.write_bytes(gemma3.read_bytes())
    checkpoint = open_checkpoint(model, scratch)
    assert not scratch.exists(), "headers are enough until the tokenizer is asked for"
    folder = checkpoint.assets
    assert folder.parent == scratch
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert open_checkpoint(model, scratch).assets == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    model.write_bytes(gemma4.read_bytes())
    other = open_checkpoint(model, scratch).assets
    assert other != folder
    assert [path for path in scratch.iterdir() if path.name != LOCK] == [other]


def test_without_a_scratch_folder_nothing_is_left(gemma3: Path) -> None:
    code = f"from gemexport.formats.checkpoint import open_checkpoint; print(open_checkpoint({str(gemma3)!r}).assets)"
    printed = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip()
    assert not Path(printed.strip()).exists()


def test_a_file_is_known_by_its_bytes_too(gemma3: Path, tmp_path: Path) -> None:
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(gemma3.read_bytes())
    assert is_gguf(blob)
    assert open_checkpoint(blob).name == "sha256-0123"
    other = tmp_path / "notes.txt"
    other.write_text("GG")
    with pytest.raises(InputError, match="is a file of no format that is known"):
        open_checkpoint(other)


def test_every_type_is_read_as_gguf_reads_it(mixed_gguf: Path) -> None:
    from gguf.quants import dequantize

    stored = read(mixed_gguf)
    names = {item.stored_name: item for item in open_checkpoint(mixed_gguf).tensors.values()}
    grids = set()
    for name, item in stored.tensors.items():
        if len(item.shape) == 2:
            grids.add(names[name].grid)
            expected = dequantize(stored.rows(item, 3, 9), item.type)
            assert np.array_equal(names[name].rows(3, 9).values, expected), item.type
    assert len(grids) == 13, "twelve types with a grid, and those without"


def with_tokens(
    path: Path, target: Path, texts: dict[int, str] | None = None, kinds: dict[int, int] | None = None
) -> Path:
    """The file with other texts and types for some tokens."""
    metadata = read(path).metadata
    listed, types = list(metadata[Keys.Tokenizer.LIST]), metadata[Keys.Tokenizer.TOKEN_TYPE].tolist()
    for index, text in (texts or {}).items():
        listed[index] = text
    for index, kind in (kinds or {}).items():
        types[index] = kind
    changes = {Keys.Tokenizer.LIST: string(listed), Keys.Tokenizer.TOKEN_TYPE: int32(types)}
    return rewritten(path, target, **changes)


@pytest.mark.parametrize("names", [("<start_of_turn>",), ("<start_of_turn>", "<end_of_turn>"), ("<|turn>", "<turn|>")])
def test_markers_of_turns_that_are_ordinary_text_are_repaired(
    names: tuple[str, ...], gemma3: Path, gemma4: Path, tmp_path: Path
) -> None:
    """A file so made was copied faithfully into every format, its conversations spelt out in pieces."""
    source = gemma4 if "|" in names[0] else gemma3
    listed = list(read(source).metadata[Keys.Tokenizer.LIST])
    broken = with_tokens(source, tmp_path / "broken.gguf", kinds={listed.index(name): 1 for name in names})
    found, expected = open_checkpoint(broken).unpack(), open_checkpoint(source).unpack()
    assert expected.notes == ()
    assert [note for note in found.notes if all(name in note for name in names)] == list(found.notes) != []
    tokenizers = [(item.folder / "tokenizer.json").read_bytes() for item in (found, expected)]
    assert tokenizers[0] == tokenizers[1]


def test_tokens_with_one_text_are_named_before_llama_cpp_ends_the_process(gemma3: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from gemexport.validators.runtimes import llama_cpp

    twice = with_tokens(gemma3, tmp_path / "twice.gguf", texts={400: "<eos>", 401: "<bos>"})
    with pytest.raises(InputError, match=r"has the token '<eos>' twice, as 1 and 400, and 1 more"):
        llama_cpp.load(twice, threads=1, context=64)


def test_every_end_of_an_answer_comes_back(tiny_gemma3: Path, tmp_path: Path) -> None:
    """llama.cpp has three keys; what is beyond them is told."""
    model = Path(shutil.copytree(tiny_gemma3, tmp_path / "model"))
    settings = json.loads((model / "generation_config.json").read_text())
    for stops, told in (([1, 6, 5], 0), ([1, 6, 5, 3], 1)):
        (model / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": stops}))
        made = exporter.export(open_checkpoint(model), tmp_path / "model.gguf", variant="BF16")
        metadata = read(made.path).metadata
        keys = (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
        assert {metadata[key] for key in keys} == {1, 5, 6}
        assert sum("does not stop at <unk> (3)" in note for note in made.notes) == told
        again = json.loads((open_checkpoint(made.path).assets / "generation_config.json").read_text())
        assert set(again["eos_token_id"]) == set(stops)
