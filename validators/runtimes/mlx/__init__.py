"""Runs an MLX folder in mlx-lm, ours or anybody's, set to float32: logits, greedy continuation, tokenizer.

mlx-lm lives in a child process (process.py): what it needs set for a whole process must not touch the validators.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from gemexport.formats.mlx import read_config
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import Floats
from gemexport.validators.checks.habits import Habits
from gemexport.validators.runtimes.protocol import Arithmetic, Laps, Layout

SAMPLING = "give mlx_lm.generate --temp, --top-k and --top-p"


def load(path: Path, *, threads: int, context: int, frugal: bool = False) -> MlxRuntime:
    """The MLX folder at `path` in mlx-lm, computing in f32, on Metal where there is one; `context` is as asked.

    `frugal` leaves tables of codes in their file, of which only rows are wanted.

    `mlx_lm.load` reads the folder; then scales, biases and unquantized tensors are cast to float32, which is
    exact, so that what is compared is the numbers in the file and not MLX's rounding of them.

    Raises InputError when mlx-lm cannot load the folder.
    """
    read_config(Path(path))
    return MlxRuntime(Path(path), threads, frugal)


class MlxRuntime:
    """A child process that holds the model and answers one request at a time."""

    arithmetic: Arithmetic = "f32"

    def __init__(self, path: Path, threads: int, frugal: bool = False) -> None:
        self.laps = Laps()
        count = str(threads)
        settings = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
        asked = [str(path), "frugal"] if frugal else [str(path)]
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "gemexport.validators.runtimes.mlx.process", *asked],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **settings, "TOKENIZERS_PARALLELISM": "false"},
        )
        self._requests, self._answers = cast(IO[bytes], self._child.stdin), cast(IO[bytes], self._child.stdout)
        greeting = self._answer()
        if "error" in greeting:
            self.close()
            problem = f"mlx-lm cannot load it ({greeting['error']})"
            raise InputError(path, problem, "export or convert the model again")
        self.name: str = greeting["name"]

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Teacher-forced logits `[len(tokens), vocab]`."""
        return self._array("logits", tokens)

    def hidden(self, tokens: Sequence[int]) -> list[Floats]:
        """What goes into the first layer and what each layer gives, `[layers + 1][n, hidden]`."""
        return list(self._array("hidden", tokens))

    def _array(self, method: str, tokens: Sequence[int]) -> Floats:
        """What comes as raw numbers after its shape."""
        shape = self._ask(method, list(tokens))
        found: Floats = np.empty(shape, np.float32)
        view = found.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            count = self._answers.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise self._died()
            done += count
        return found

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` most likely next tokens, one at a time through mlx-lm's own cache."""
        return list(self._ask("greedy", list(tokens), count))

    def tokenize(self, text: str) -> list[int] | None:
        """The ids that mlx-lm's tokenizer gives, without BOS."""
        return list(self._ask("tokenize", text))

    def habits(self) -> Habits:
        """What mlx-lm puts before a text, where it stops, how it pads and decodes."""
        said = self._ask("habits")
        return Habits(
            tuple(said["begins"]),
            frozenset(said["stops"]),
            said["pad"],
            lambda ids: str(self._ask("decode", list(ids))),
            likeliest=SAMPLING,
        )

    def chat(self, layouts: Sequence[Layout]) -> list[str] | None:
        """Conversations as mlx-lm's tokenizer lays them out."""
        return list(self._ask("chat", [dict(layout) for layout in layouts]))

    def close(self) -> None:
        """End the child process."""
        self._requests.close()
        self._answers.close()
        self._child.wait()

    def _ask(self, method: str, *arguments: Any) -> Any:
        self._requests.write(json.dumps([method, *arguments]).encode() + b"\n")
        self._requests.flush()
        answer = self._answer()
        self.laps.laps += [(tokens, seconds) for tokens, seconds in answer["laps"]]
        return answer["value"]

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _died(self) -> RuntimeError:
        return RuntimeError(f"mlx-lm's process ended with status {self._child.wait()}; its last words are above")
