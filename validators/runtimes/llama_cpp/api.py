"""llama.cpp's C interface, as the compiled module of `xllamacpp` exports it: full logits of every position in one call.

`xllamacpp`'s own Server gives the few likeliest tokens of one position at a time. The structures below follow
include/llama.h; llama.cpp changes them now and then, so their defaults are checked before anything is loaded.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from gemexport.formats.storage.errors import InputError

FLASH_ATTENTION_OFF = 0
TYPE_F32 = 0
LOG_WARNING = 3  # ggml_log_level: 1 debug, 2 info, 3 warning, 4 error, 5 the rest of the line before
TESTED = "2026.10"

EvalCallback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class ModelParams(ctypes.Structure):
    """`llama_model_params`, opaque: the defaults serve. Larger than the real one, as both calling conventions allow."""

    _fields_ = (("opaque", ctypes.c_uint8 * 512),)


class ContextParams(ctypes.Structure):
    """`llama_context_params` up to the last field used here; the tail is larger than the real one's."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("ctx_type", ctypes.c_int),
        ("rope_scaling_type", ctypes.c_int),
        ("pooling_type", ctypes.c_int),
        ("attention_type", ctypes.c_int),
        ("flash_attn_type", ctypes.c_int),
        ("rope_freq_base", ctypes.c_float),
        ("rope_freq_scale", ctypes.c_float),
        ("yarn_ext_factor", ctypes.c_float),
        ("yarn_attn_factor", ctypes.c_float),
        ("yarn_beta_fast", ctypes.c_float),
        ("yarn_beta_slow", ctypes.c_float),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int),
        ("type_v", ctypes.c_int),
        ("opaque", ctypes.c_uint8 * 384),
    )


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


# What llama.cpp's defaults are, and have been for years: a layout that has moved shows different numbers here.
_EXPECTED = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "cb_eval": None,
    "type_k": 1,
    "type_v": 1,
}

_POINTER, _INT, _BOOL = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, _POINTER]),
    "llama_model_default_params": (ModelParams, []),
    "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, ModelParams]),
    "llama_model_free": (None, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_context_default_params": (ContextParams, []),
    "llama_init_from_model": (_POINTER, [_POINTER, ContextParams]),
    "llama_free": (None, [_POINTER]),
    "llama_n_ctx": (ctypes.c_uint32, [_POINTER]),
    "llama_n_batch": (ctypes.c_uint32, [_POINTER]),
    "llama_set_n_threads": (None, [_POINTER, _INT, _INT]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, _BOOL]),
    "llama_batch_init": (Batch, [_INT, _INT, _INT]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (_INT, [_POINTER, Batch]),
    "llama_pooling_type": (ctypes.c_int, [_POINTER]),
    "llama_set_embeddings": (None, [_POINTER, _BOOL]),
    "llama_model_n_embd": (_INT, [_POINTER]),
    "llama_model_n_embd_out": (_INT, [_POINTER]),
    "llama_get_embeddings_seq": (ctypes.POINTER(ctypes.c_float), [_POINTER, _INT]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_POINTER]),
    "ggml_get_name": (ctypes.c_char_p, [_POINTER]),
    "ggml_nbytes": (ctypes.c_size_t, [_POINTER]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_vocab_bos": (_INT, [_POINTER]),
    "llama_vocab_get_add_bos": (_BOOL, [_POINTER]),
    "llama_vocab_get_text": (ctypes.c_char_p, [_POINTER, _INT]),
    "llama_vocab_is_eog": (_BOOL, [_POINTER, _INT]),
    "llama_vocab_pad": (_INT, [_POINTER]),
    "llama_token_to_piece": (_INT, [_POINTER, _INT, ctypes.c_char_p, _INT, _INT, _BOOL]),
    "llama_tokenize": (_INT, [_POINTER, ctypes.c_char_p, _INT, ctypes.POINTER(ctypes.c_int32), _INT, _BOOL, _BOOL]),
}


class Api:
    """The functions as attributes, by their C names; llama.cpp's messages go to `messages` instead of stderr."""

    def __init__(self) -> None:
        try:
            with _little_spinning():
                import xllamacpp.xllamacpp as compiled
        except ImportError as error:
            remedy = "install gemexport[llama], and on Linux the system's libgomp (package libgomp1)"
            raise InputError("xllamacpp", f"cannot be loaded ({error})", remedy) from error
        self.version = version("xllamacpp")
        self.messages: deque[str] = deque(maxlen=20)  # warnings and errors, the latest last
        self._library = ctypes.CDLL(compiled.__file__)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise self._other_version(f"does not export {name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        # The callback must live as long as llama.cpp may call it.
        self._callback = LogCallback(self._log)
        self.llama_log_set(self._callback, None)
        self.llama_backend_init()
        defaults = self.llama_context_default_params()
        found = {name: getattr(defaults, name) for name in _EXPECTED}
        if found != _EXPECTED:
            raise self._other_version(f"has other context parameters ({found})")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(name)

    def _other_version(self, problem: str) -> RuntimeError:
        return RuntimeError(f"xllamacpp {self.version} {problem}; install the tested version, {TESTED}")

    def _log(self, level: int, text: bytes, _: object) -> None:
        if level >= LOG_WARNING:
            self.messages.append(" ".join(text.decode("utf-8", "replace").split()))


@contextmanager
def _little_spinning() -> Iterator[None]:
    """Let GNU OpenMP, which reads its settings when it is loaded, give up the processor soon when threads wait.

    By default its threads spin through every barrier: beside another busy process, 64 tokens of a small model took 7 s
    instead of 0.4 s.
    """
    name = "GOMP_SPINCOUNT"
    before = os.environ.get(name)
    os.environ.setdefault(name, "2000")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


@lru_cache(maxsize=1)
def api() -> Api:
    """The interface, loaded once a process.

    Raises InputError when `xllamacpp` cannot be loaded, RuntimeError when its layout is another.
    """
    return Api()
