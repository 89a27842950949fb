"""ggml's own quantizer: rows of float32 become blocks of any of its types, byte for byte what llama.cpp writes.

The library is the one that the package libggml-python carries (`ggml.h` beside it declares the functions), called
through ctypes. Rows are quantized one by one, so a tensor may come in any slices and on any number of threads.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.installing import install
from gemexport.formats.tensor import Floats

_FOLDERS = ("lib64", "lib", "bin")  # where wheels for Linux, macOS and Windows have it
_FILES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}


def quantize(kind: GGMLQuantizationType, values: Floats, importance: Floats | None = None) -> NDArray[np.uint8] | None:
    """The bytes `[rows, row bytes]` of values `[rows, in]` in the type `kind`; None when it cannot hold them.

    That is so for values that are not finite, and where ggml finds a block whose scale is not. `importance` `[in]`
    weighs the squared error of each column. `in` must be a multiple of the type's block. Raises InputError when
    libggml-python is not installed.
    """
    rows, width = values.shape
    block, size = GGML_QUANT_SIZES[kind]
    if width % block:
        raise ValueError(f"rows of {width} weights do not divide into blocks of {block} ({kind.name})")
    if importance is not None and importance.shape != (width,):
        raise ValueError(f"importance {importance.shape} for rows of {width} weights")
    library = _library()
    source = np.ascontiguousarray(values, dtype=np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    out = np.empty((rows, width // block * size), np.uint8)
    if not np.isfinite(source).all():
        return None
    if library.ggml_row_size(kind, width) != out.shape[1]:
        raise RuntimeError(f"ggml and the gguf package disagree about the bytes of {kind.name}")
    library.ggml_quantize_chunk(
        kind, source.ctypes.data, out.ctypes.data, 0, rows, width, None if weights is None else weights.ctypes.data
    )
    return out if library.ggml_validate_row_data(kind, out.ctypes.data, out.nbytes) else None


def check_installed() -> None:
    """Raise InputError when there is no library to call."""
    _library()


@cache
def _library() -> Any:
    """libggml-base with the types of the functions that are called here."""
    library = ctypes.CDLL(str(_library_path()))
    kind, count, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.ggml_row_size.argtypes = [kind, count]
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [kind, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_validate_row_data.argtypes = [kind, pointer, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    return library


def _library_path() -> Path:
    spec = find_spec("libggml")
    name = _FILES.get(sys.platform, "libggml-base.so")
    for folder in spec.submodule_search_locations or () if spec else ():
        for part in _FOLDERS:
            if (path := Path(folder) / part / name).is_file():
                return path
    raise InputError("K-quants", "need libggml-python, which is not installed", install("kquants"))
