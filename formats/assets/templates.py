"""Chat templates: where a checkpoint has them, and what ends a turn in them.

transformers looks in chat_template.jinja, in additional_chat_templates/, in tokenizer_config.json, and, where a
processor loads them, in chat_template.json (transformers.tokenization_utils_base, transformers.processing_utils).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.limited import ExceededError, call
from gemexport.formats.storage.reading import read_optional_json, read_text

FILE, OLD_FILE, FOLDER = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
KEY = "chat_template"
DEFAULT = "default"
MAX_TEMPLATES = 64
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
REMEDY = "use the chat template that came with the model"


@dataclass(frozen=True)
class Templates:
    """The templates of a checkpoint by name, and where each was found."""

    texts: Mapping[str, str]
    places: Mapping[str, Path]

    @property
    def default(self) -> str | None:
        """The one for conversations without a special purpose."""
        return self.texts.get(DEFAULT)


def find(folder: Path, settings: Mapping[str, Any]) -> Templates:
    """Every template of a checkpoint, found where transformers finds it; `settings` are those of tokenizer_config.json.

    Raises InputError for what is no template.
    """
    listed = folder / "tokenizer_config.json"
    texts = dict(_listed(settings.get(KEY), listed))
    places = dict.fromkeys(texts, listed)
    old = folder / OLD_FILE
    if not texts:
        texts.update(_listed(read_optional_json(old).get(KEY), old))
        places.update(dict.fromkeys(texts, old))
    files = {DEFAULT: folder / FILE} if (folder / FILE).exists() else {}
    if (folder / FOLDER).is_dir():
        files |= {file.stem: file for file in sorted((folder / FOLDER).glob("*.jinja"))}
    if len(files) + len(texts) > MAX_TEMPLATES:
        raise InputError(folder, f"has more than {MAX_TEMPLATES} chat templates", REMEDY)
    if files:  # then these are all, in transformers
        texts, places = {name: read_text(file) for name, file in files.items()}, files
    return Templates(texts, places)


def _listed(found: Any, path: Path) -> Iterable[tuple[str, str]]:
    """Templates as a setting has them: one text, a list of named ones, or an object."""
    if found is None:
        return
    if isinstance(found, str):
        yield DEFAULT, found
        return
    if isinstance(found, dict):
        found = [{"name": name, "template": text} for name, text in found.items()]
    for item in found if isinstance(found, list) else [None]:
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("name", "template")):
            raise InputError(path, f"{KEY} is neither a text nor a list of named ones", REMEDY)
        yield item["name"], item["template"]


def turn_end(templates: Templates, tokens: Mapping[str, str], specials: Iterable[str]) -> str | None:
    """The special token that ends the model's turn in the default template; None where none does, or it has no layout.

    `tokens` are the special tokens that a template may name (`bos_token` …). Raises InputError for a template that
    takes more time or memory than any layout does.
    """
    if templates.default is None:
        return None
    path = templates.places[DEFAULT]
    try:
        text = _laid_out(templates.default, tuple(sorted(tokens.items())))
    except ExceededError as error:
        raise InputError(path, f"the chat template {error} to lay out a conversation", REMEDY) from error
    _, found, rest = (text or "").rpartition(ANSWER)
    if not found:
        return None
    places = {token: rest.find(token) for token in specials if token}
    ends = [token for token, place in places.items() if place >= 0]
    return min(ends, key=lambda token: (places[token], -len(token)), default=None)


@lru_cache(maxsize=8)
def _laid_out(template: str, tokens: tuple[tuple[str, str], ...]) -> str | None:
    found: str | None = call(__name__, {"template": template, "tokens": dict(tokens)})
    return found


def answer(argument: Mapping[str, Any]) -> str | None:
    """A question and its answer as a template lays them out; None where it refuses. Runs in a process with limits."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: "2026-01-01"
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    source = argument["template"].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    try:
        return environment.from_string(source).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=False, **argument["tokens"]
        )
    except MemoryError:
        raise
    except Exception:  # a template may raise anything, and refuses conversations by raising
        return None
