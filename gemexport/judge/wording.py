"""Tokenizer and chat template of an artefact against the checkpoint's: tables, thousands of texts, conversations.

Where a runtime errs with an artefact that is right, which the artefact's own tables show, it is named and no fault of
the artefact (docs/bounds.md).
"""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from gemexport.formats.checkpoint import Checkpoint, is_gguf, open_checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.judge.attempts import Attempts
from gemexport.shared.measured import ChatDifference, ChatReport, TokenizerDifference, TokenizerReport
from gemexport.shared.texts import encoded, vocabulary_of
from gemexport.validators.checks import chat, habits, prompts, tokenizer, vocabulary
from gemexport.validators.checks.habits import Habits
from gemexport.validators.checks.tokenizer import Difference
from gemexport.validators.runtimes.protocol import NoEngineError, Runtime

SHOWN = 20  # texts in the report, the shortest of each sort first
KEPT = "reference/wording"  # folder in the work folder of the checkpoint's texts and ids
Wordings = tuple[TokenizerReport | None, ChatReport | None]
NONE = "it has no tokenizer, and none lies beside it"
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Artifact:
    """Where an artefact has its tokenizer, and what it is when read back."""

    path: Path  # a GGUF file, or the folder with tokenizer.json
    scratch: Path

    @classmethod
    def of(cls, path: Path, scratch: Path) -> Artifact | None:
        """The tokenizer of the artefact at `path`, in it or beside it; None where there is none."""
        if path.is_file():
            return cls(path, scratch) if is_gguf(path) else None
        if (path / vocabulary.GENAI).is_file():
            return cls(path, scratch)  # onnxruntime-genai does not run it without one
        places = (path, path.parent) if path.suffix == ".mlpackage" else (path,)
        return next((cls(place, scratch) for place in places if (place / FILES[0]).is_file()), None)

    @cached_property
    def folder(self) -> Path | None:
        """It as files in Hugging Face layout; None for what cannot be read so."""
        if self.path.is_dir():
            return self.path
        try:
            return open_checkpoint(self.path, self.scratch / "read-back").assets
        except InputError:
            return None

    def encode(self) -> Callable[[str], list[int]] | None:
        """Hugging Face's tokenizers with the artefact's tables."""
        file = self.folder / FILES[0] if self.folder else None
        return tokenizer.load(file) if file is not None and file.is_file() else None

    def habits(self) -> Habits | None:
        """What programs do that take its tokenizer.json as it is."""
        file = self.folder / FILES[0] if self.folder else None
        return habits.of_file(file) if file is not None and file.is_file() else None

    def template(self) -> chat.Template | None:
        """The artefact's chat template."""
        return chat.template(self.path)


class Wording:
    """The checkpoint's side; what takes long of it is made once a run, and kept in the folder `work`."""

    def __init__(self, checkpoint: Checkpoint, work: Path) -> None:
        self._checkpoint, self._work = checkpoint, work
        self._assets = checkpoint.assets
        self._size = checkpoint.architecture.vocab_size

    @cached_property
    def _texts(self) -> dict[str, tuple[int, ...]]:
        """Texts and their ids, but for those with a token that the model has no row for."""
        found = encoded(self._checkpoint, self._work)
        return {text: ids for text, ids in found.items() if max(ids, default=0) < self._size}

    def tokenizer(self, artifact: Artifact, runtime: Runtime | None) -> TokenizerReport:
        """Tables, and every text's ids in the runtime, or in Hugging Face's tokenizers where it has none of its own."""
        tables, expected = self._tables(artifact), self._texts
        try:
            own = runtime is not None and runtime.tokenize("") is not None
            done, left = self._habits(artifact, runtime)
            tables = (*tables, *done)
        except InputError as error:  # its program does not take it
            return TokenizerReport(texts=len(expected), equal=0, vocabulary=(*tables, error.problem))
        name = runtime.name if runtime is not None and own else f"tokenizers {version('tokenizers')}"
        found = (lambda text: runtime.tokenize(text) or []) if runtime is not None and own else artifact.encode()
        if found is None:
            return TokenizerReport(texts=len(expected), equal=0, name=name, vocabulary=tables, notes=left)
        compared = tokenizer.compare(expected.__getitem__, found, list(expected))
        differing = compared.differences
        right = self._right(artifact, tables, differing) if own else set()
        ordinary = set(prompts.prompts())
        return TokenizerReport(
            texts=compared.texts,
            equal=compared.equal,
            name=name,
            runtime_only=len(right),
            ordinary=sum(item.text in ordinary for item in differing),
            vocabulary=tables,
            notes=left,
            differences=tuple(
                TokenizerDifference(
                    text=item.text, expected=item.expected, found=item.found, runtime=item.text in right
                )
                for item in sorted(differing, key=lambda item: (item.text in right, len(item.text)))[:SHOWN]
            ),
        )

    def _habits(self, artifact: Artifact, runtime: Runtime | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What the program, or who takes its tokenizer.json, does otherwise; and what it leaves to its caller."""
        own, read_back = None if runtime is None else runtime.habits(), artifact.habits()
        found = own or read_back
        if found is None:
            return (), ()
        name = runtime.name.partition(" (")[0] if runtime is not None and own else "tokenizers"
        ours = vocabulary_of(self._assets)
        bos = ours.ids.get("bos")
        expected = replace(
            habits.of_file(self._assets / FILES[0]),
            begins=None if not ours.stated else (bos,) if ours.add_bos and bos is not None else (),
            stops=ours.stops,
            pad=ours.ids.get("pad"),
        )

        def shown(token: int) -> str:
            return f"{token} ({ours.token(token)})"

        texts = [self._texts[text] for text in prompts.prompts() if text in self._texts]
        done = [*habits.differences(name, expected, found, shown)]
        left = [*habits.notes(name, expected, found, shown, ours.sampling)]
        if said := habits.decoded(name, expected, found, texts):
            # Its tables give the checkpoint's texts to others: then it is the program that reads ids otherwise.
            right = read_back is not None and habits.decoded("tokenizers", expected, read_back, texts) is None
            (left if own and right else done).append(said)
        return tuple(done), tuple(left)

    def _right(self, artifact: Artifact, tables: tuple[str, ...], differing: tuple[Difference, ...]) -> set[str]:
        """The texts for which the artefact's own tables give the checkpoint's ids.

        A GGUF file is nothing but its tables: where these are the checkpoint's, all are. A tokenizer.json holds more,
        and is tried.
        """
        if artifact.path.is_file() or not differing:
            return set() if tables else {item.text for item in differing}
        read_back = artifact.encode()
        return {item.text for item in differing if read_back and tuple(read_back(item.text)) == item.expected}

    def chat(self, artifact: Artifact, runtime: Runtime | None) -> ChatReport | None:
        """Every conversation that the checkpoint's template takes; None where the checkpoint has no template."""
        own = chat.template(self._assets)
        if own is None:
            return None
        ours = f"transformers {version('transformers')}"
        expected = chat.taken(own)
        refusal = None if any(conversation.plain for conversation, _ in expected) else chat.refusal(own)
        if not expected:  # engines would make up something
            return ChatReport(engine=ours, conversations=0, equal=0, refusal=refusal)
        layouts = [conversation.layout() for conversation, _ in expected]
        template = artifact.template()
        # Under limits first: some runtimes render a template in their own process, and without any.
        known = [text for _, text in expected]
        read_back = None if template is None else known if template == own else template.render(layouts)
        notes, texts = [], None
        try:
            texts = runtime.chat(layouts) if runtime is not None else None
        except NoEngineError as error:
            notes.append(str(error))
        engine = runtime.name if runtime is not None and texts is not None else ours
        if texts is None:
            missing = f"{chat.REFUSED}there is no chat template"
            texts = [missing] * len(layouts) if read_back is None else read_back
        compared = chat.compare(expected, texts, read_back)
        return ChatReport(
            engine=engine,
            conversations=compared.conversations,
            equal=compared.conversations - len(compared.differences),
            runtime_only=sum(item.runtime for item in compared.differences),
            notes=tuple(notes),
            refusal=refusal,
            differences=tuple(
                ChatDifference(
                    conversation=item.conversation, expected=item.expected, found=item.found, runtime=item.runtime
                )
                for item in compared.differences
            ),
        )

    def _tables(self, artifact: Artifact) -> tuple[str, ...]:
        """What differs between the files, in sentences; nothing is read of files that are copies."""
        pairs = [(self._assets / name, artifact.path / name) for name in FILES]
        copied = artifact.path.is_dir() and all(_same(ours, theirs) for ours, theirs in pairs)
        try:
            if copied and not vocabulary.settings_differ(self._assets, artifact.path):
                return ()
            return vocabulary.compare(vocabulary_of(self._assets), vocabulary.read(artifact.path), self._size)
        except InputError as error:
            return (error.problem,)


def _same(ours: Path, theirs: Path) -> bool:
    if not (ours.is_file() and theirs.is_file()):
        return ours.is_file() == theirs.is_file()
    return filecmp.cmp(ours, theirs, shallow=False)


def check_wording(
    attempts: Attempts, work: Path, checkpoint: Checkpoint, path: Path, runtime: Runtime | None
) -> Wordings:
    """Tokenizer and chat template of an artefact in its runtime, or read back where there is none.

    `work` is the folder for what is unpacked on the way.
    """
    artifact = Artifact.of(path, work)
    if artifact is None:
        attempts.leave_out("tokenizer", NONE)
        attempts.leave_out("chat", NONE)
        return None, None
    wording = Wording(checkpoint, work)
    return (
        attempts.make("tokenizer", lambda: wording.tokenizer(artifact, runtime)),
        attempts.make("chat", lambda: wording.chat(artifact, runtime)),
    )
