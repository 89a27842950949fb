"""gemexport: one Gemma checkpoint in, five validated formats out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemexport._version import __version__

if TYPE_CHECKING:
    from gemexport.api import export, validate
    from gemexport.formats.storage.errors import InputError
    from gemexport.report.console import Advance

__all__ = ["Advance", "InputError", "__version__", "export", "validate"]

# At the root of a checkout Python finds this folder before the package that was installed; formats, exporters and
# validators lie beside it there.
if (_checkout := Path(__file__).parents[1]).joinpath("formats", "tensor.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    """`export` and `validate` are imported when they are first used: `gemexport --help` should not wait for them."""
    if name in ("export", "validate"):
        from gemexport import api

        return getattr(api, name)
    if name == "Advance":
        from gemexport.report.console import Advance

        return Advance
    if name == "InputError":
        from gemexport.formats.storage.errors import InputError

        return InputError
    raise AttributeError(f"module 'gemexport' has no attribute {name!r}")
