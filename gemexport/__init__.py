"""gemexport: one Gemma checkpoint in, five validated formats out."""

from gemexport._version import __version__

__all__ = ["__version__"]
