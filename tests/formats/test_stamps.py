"""A checkpoint that is replaced, in whichever way, is told from one that is only read."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.stamps import ChangedError, Stamps

WEIGHTS = "model.safetensors"


def replaced(folder: Path) -> None:
    """Other bytes, as many, of the same time, as a download or rsync puts them there."""
    file = folder / WEIGHTS
    before, beside = file.stat(), folder / "beside"
    beside.write_bytes(file.read_bytes()[::-1])
    os.utime(beside, ns=(before.st_atime_ns, before.st_mtime_ns))
    beside.replace(file)


def written_to(folder: Path) -> None:
    file = folder / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    time = file.stat().st_mtime_ns
    file.write_bytes(data)
    os.utime(file, ns=(time, time + 1))


def another_folder(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("other"))
    folder.rename(folder.with_name("old"))
    folder.with_name("other").rename(folder)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "replaced": (replaced, f"{WEIGHTS}: was replaced while"),
    "written to": (written_to, f"{WEIGHTS}: was written to while"),
    "longer": (lambda folder: (folder / "config.json").open("a").write("\n"), "config.json: was replaced .* bytes"),
    "removed": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: was removed while"),
    "another shard": (lambda folder: (folder / "more.safetensors").touch(), "more.safetensors: appeared while"),
    "settings": (lambda folder: (folder / "chat_template.jinja").touch(), "chat_template.jinja: appeared while"),
    "folder": (another_folder, "was replaced while"),
}
READINGS: dict[str, Callable[[Path], object]] = {
    "read": lambda folder: [file.read_bytes() for file in folder.iterdir()],
    "of another time of reading": lambda folder: os.utime(
        folder / WEIGHTS, ns=(0, (folder / WEIGHTS).stat().st_mtime_ns)
    ),
    "linked": lambda folder: os.link(folder / WEIGHTS, folder.with_name("link")),
    "of other rights": lambda folder: (folder / WEIGHTS).chmod(0o400),
    "with a README": lambda folder: (folder / "README.md").touch(),
    "with results beside": lambda folder: (folder / "eval_results.json").touch(),
    "with a folder in it": lambda folder: (folder / "artifacts").mkdir(),
}


@pytest.fixture
def model(tiny_gemma3: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Gemma 3."""
    return Path(shutil.copytree(tiny_gemma3, tmp_path / "model"))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_told_and_names_the_file(change: str, model: Path) -> None:
    edit, said = CHANGES[change]
    stamps = open_checkpoint(model).stamps
    edit(model)
    with pytest.raises(ChangedError, match=said) as caught:
        stamps.check()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), ChangedError)


@pytest.mark.parametrize("reading", READINGS)
def test_what_is_no_change_is_none(reading: str, model: Path) -> None:
    stamps = open_checkpoint(model).stamps
    READINGS[reading](model)
    stamps.check()


def test_links_are_followed(model: Path, tmp_path: Path) -> None:
    """The Hub's cache has links to files that are called by their hashes."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(file)
    stamps = open_checkpoint(snapshot).stamps
    stamps.check()
    replaced(model)
    with pytest.raises(ChangedError, match=r"model.safetensors: was replaced"):
        stamps.check()
    shutil.copyfile(model / "config.json", tmp_path / "newer")
    stamps = Stamps.of(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "newer")
    with pytest.raises(ChangedError, match=r"config.json: was replaced"):
        stamps.check()


def test_the_other_parts_of_a_gguf_model_and_the_adapter_belong_to_it(model: Path, tmp_path: Path) -> None:
    parts = [tmp_path / f"big-{number:05}-of-00002.gguf" for number in (1, 2)]
    for part in (*parts, tmp_path / "other-00001-of-00002.gguf"):
        part.write_bytes(b"GGUF")
    stamps = Stamps.of(parts[0], model)
    assert {path.name for path in stamps.found if path.suffix == ".gguf"} == {part.name for part in parts}
    parts[1].write_bytes(b"GGUF2")
    with pytest.raises(ChangedError, match=r"00002-of-00002"):
        stamps.check()


def test_what_is_not_there_is_for_others_to_tell(tmp_path: Path) -> None:
    Stamps.of(tmp_path / "nothing").check()
