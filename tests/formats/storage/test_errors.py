"""An InputError is one line, whatever a file had in it, and crosses process borders whole."""

from __future__ import annotations

import pickle

from gemexport.formats.storage.errors import InputError, shown


def test_one_line_whatever_is_quoted() -> None:
    error = InputError("a.gguf", "says that it has [1\n 2] layers", "export it again")
    assert str(error) == "a.gguf: says that it has [1 2] layers; export it again"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.problem) == (str(error), error.problem)


def test_what_acts_on_a_terminal_is_written_out() -> None:
    error = InputError("a\x1b[2J\nb.gguf", "has the tensor \x07 and \udcff", "export it again")
    assert str(error) == "a\\x1b[2J\\nb.gguf: has the tensor \\x07 and \\udcff; export it again"
    assert shown("Mödell 1\u202f000 \u4f60 \U0001f60a") == "Mödell 1\u202f000 \u4f60 \U0001f60a"
    assert shown("a\nb\x85", lines=True) == "a\nb\\x85"
