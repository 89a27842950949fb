"""gemexport: one Gemma checkpoint in, five validated formats out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemexport._version import __version__

if TYPE_CHECKING:
    from gemexport.api import export, validate
    from gemexport.formats.errors import InputError

__all__ = ["InputError", "__version__", "export", "validate"]


def __getattr__(name: str) -> Any:
    """`export` and `validate` are imported when they are first used: `gemexport --help` should not wait for them."""
    if name in ("export", "validate"):
        from gemexport import api

        return getattr(api, name)
    if name == "InputError":
        from gemexport.formats.errors import InputError

        return InputError
    raise AttributeError(f"module 'gemexport' has no attribute {name!r}")
