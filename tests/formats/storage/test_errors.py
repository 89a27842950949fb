"""An InputError is one line, whatever a file had in it, and crosses process borders whole."""

from __future__ import annotations

import pickle

from gemexport.formats.storage.errors import InputError


def test_one_line_whatever_is_quoted() -> None:
    error = InputError("a.gguf", "says that it has [1\n 2] layers", "export it again")
    assert str(error) == "a.gguf: says that it has [1 2] layers; export it again"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.problem) == (str(error), error.problem)
