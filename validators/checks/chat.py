"""Conversations laid out by a chat template: what the checkpoint's gives, and what an artefact makes of the same ones.

Templates are rendered as transformers does it, in Jinja's sandbox and under limits; no other code of a checkpoint runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gemexport.formats.assets.templates import REMEDY
from gemexport.formats.checkpoint import is_gguf
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.limited import ExceededError, call
from gemexport.formats.storage.reading import read_text
from gemexport.validators.checks.vocabulary import content, settings_of
from gemexport.validators.runtimes.protocol import Layout

_AS_PYTHON = "{'type': 'text'"  # a list printed as it is, by a template that expects a text
REFUSED = "refused: "  # begins what stands for a text where an engine gives none
SECONDS = 5.0  # for all conversations; Gemma's own template takes a tenth of one

_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the place"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "description": "How many days ahead"},
            },
            "required": ["city"],
        },
    },
}
_SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Find documents.",
        "parameters": {
            "type": "object",
            "properties": {"words": {"type": "array", "items": {"type": "string"}}, "exact": {"type": "boolean"}},
            "required": ["words"],
        },
    },
}


@dataclass(frozen=True)
class Conversation:
    """One conversation, and how it is to be laid out."""

    name: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool = False
    answer: bool = True  # whether the layout ends where the model's answer begins

    @property
    def plain(self) -> bool:
        """Whether every content is a text, and none is in parts."""
        return all(isinstance(message["content"], str) for message in self.messages)

    def in_parts(self) -> Conversation:
        """The same with every text as a part of its own."""
        messages = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            else message
            for message in self.messages
        ]
        return replace(self, messages=tuple(messages))

    def layout(self) -> Layout:
        """What an engine is given, as plain JSON."""
        return {
            "messages": list(self.messages),
            "tools": list(self.tools),
            "thinking": self.thinking,
            "add_generation_prompt": self.answer,
        }


def _says(role: str, text: Any, **more: Any) -> Mapping[str, Any]:
    return {"role": role, "content": text, **more}


def _calls(*calls: tuple[str, Mapping[str, Any]], **more: Any) -> Mapping[str, Any]:
    made = [
        {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": dict(arguments)}}
        for number, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": "", "tool_calls": made, **more}


def _result(number: int, name: str, text: str) -> Mapping[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{number:05}", "name": name, "content": text}


# What TranslateGemma takes, and nothing else.
_TO_GERMAN = {"type": "text", "source_lang_code": "en", "target_lang_code": "de", "text": "Good morning."}
_ASKED = _says("user", "What is the capital of France?")
_ANSWERED = _says("assistant", "The capital of France is Paris.")
_SYSTEM = _says("system", "You are a helpful assistant. Answer in one sentence.")
_RAIN = _says("user", "Will it rain in Zürich tomorrow? 🌧️")
_CALL = _calls(("get_weather", {"city": "Zürich", "days": 1}))
_FOUND = _result(0, "get_weather", '{"rain": true, "mm": 4.5}')

CONVERSATIONS = (
    Conversation("user", (_ASKED,)),
    Conversation("user, no answer begun", (_ASKED,), answer=False),
    Conversation("finished", (_ASKED, _ANSWERED), answer=False),
    Conversation("several turns", (_ASKED, _ANSWERED, _says("user", "And of Italy?"))),
    Conversation("system", (_SYSTEM, _ASKED)),
    Conversation("system, several turns", (_SYSTEM, _ASKED, _ANSWERED, _says("user", "And of Italy?"))),
    Conversation("spaces and lines", (_says("user", "  \n two lines,\n\n  indented\t\n "),)),
    Conversation("markup as text", (_says("user", "<b>&amp; {{ x }} {% y %} 'q' \"q\" \\n</b> <turn|>"),)),
    Conversation("other scripts", (_says("user", "日本語 مرحبا e\u0301 👩‍👩‍👧‍👦 \u200b"), _ANSWERED, _ASKED)),
    Conversation("parts", (_says("user", [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]),)),
    Conversation("one item with languages", (_says("user", [_TO_GERMAN]),)),
    Conversation("empty", (_says("user", ""),)),
    Conversation("thinking", (_ASKED,), thinking=True),
    Conversation("thinking, system", (_SYSTEM, _ASKED), thinking=True),
    Conversation(
        "thought before", (_ASKED, {**_ANSWERED, "reasoning_content": "I know it."}, _RAIN), thinking=True
    ),
    Conversation("tools", (_RAIN,), (_WEATHER, _SEARCH)),
    Conversation("tools, system, thinking", (_SYSTEM, _RAIN), (_WEATHER,), thinking=True),
    Conversation("tool called", (_RAIN, _CALL, _FOUND), (_WEATHER, _SEARCH)),
    Conversation("tool called after a thought", (_RAIN, {**_CALL, "reasoning_content": "Look it up."}, _FOUND),
                 (_WEATHER,), thinking=True),
    Conversation("tool called, answered", (_RAIN, _CALL, _FOUND, _says("assistant", "Yes, 4.5 mm."),
                 _says("user", "And in Bern?")), (_WEATHER,)),
    Conversation(
        "two tools called",
        (_RAIN, _calls(("get_weather", {"city": "Bern"}), ("search", {"words": ["rain", "Bern"], "exact": True})),
         _result(0, "get_weather", "dry"), _result(1, "search", "nothing")),
        (_WEATHER, _SEARCH),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Template:
    """A chat template, the special tokens that it may name, and where it is from."""

    source: str
    tokens: Mapping[str, str]
    path: Path = field(default=Path("the chat template"), compare=False)

    def render(self, layouts: Sequence[Layout]) -> list[str]:
        """Conversations as transformers lays them out; REFUSED and the reason for each that the template does not take.

        All of them in one process, with limits: InputError for a template that takes more time or memory than any does.
        """
        argument = {"source": self.source, "tokens": dict(self.tokens), "layouts": [dict(layout) for layout in layouts]}
        try:
            found: list[str] = call("gemexport.validators.checks.rendering", argument, seconds=SECONDS)
        except ExceededError as error:
            raise InputError(self.path, f"the chat template {error} to lay out conversations", REMEDY) from error
        return found


def apply(apply_chat_template: Callable[..., Any], layout: Layout) -> str:
    """A conversation as a tokenizer's `apply_chat_template` lays it out; REFUSED and the reason where it does not."""
    try:
        found = apply_chat_template(
            list(layout["messages"]),
            tools=list(layout["tools"]) or None,
            tokenize=False,
            add_generation_prompt=layout["add_generation_prompt"],
            enable_thinking=layout["thinking"],
        )
    except Exception as error:  # a template may raise anything, and refuses conversations by raising
        return f"{REFUSED}{error}".splitlines()[0]
    return str(found)


def template(folder: Path) -> Template | None:
    """The chat template of a folder in Hugging Face layout or of a GGUF file; None where it has none.

    Raises InputError for a tokenizer_config.json that is broken.
    """
    if is_gguf(folder):
        return _gguf_template(folder)
    settings = settings_of(folder)
    file = folder / "chat_template.jinja"
    source = read_text(file) if file.is_file() else settings.get("chat_template")
    if isinstance(source, list):
        source = next((item.get("template") for item in source if item.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    named = {name: content(settings.get(name)) for name in settings if name.endswith("_token")}
    return Template(source, {name: text for name, text in named.items() if text is not None}, folder)


def laid_out(template: Template | None, talks: Sequence[Sequence[tuple[str, str]]]) -> list[str]:
    """Finished conversations of (role, words) as texts; without a template that takes one, its words alone."""
    layouts = [
        Conversation("", tuple(_says(role, words) for role, words in turns), answer=False).layout() for turns in talks
    ]
    found = template.render(layouts) if template else [REFUSED] * len(talks)
    return [
        "\n\n".join(words for _, words in turns) if text.startswith(REFUSED) else text
        for text, turns in zip(found, talks, strict=True)
    ]


def _gguf_template(path: Path) -> Template | None:
    from gguf.constants import Keys

    from gemexport.formats.gguf.parts import read_parts

    metadata = read_parts(path).metadata
    source, texts = metadata.get(Keys.Tokenizer.CHAT_TEMPLATE), metadata.get(Keys.Tokenizer.LIST)
    if not isinstance(source, str) or texts is None:
        return None
    keys = {"bos_token": Keys.Tokenizer.BOS_ID, "eos_token": Keys.Tokenizer.EOS_ID}
    ids = {name: metadata.get(key) for name, key in keys.items()}
    named = {name: texts[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(texts)}
    return Template(source, named, path)


@dataclass(frozen=True)
class Difference:
    """A conversation that is laid out differently."""

    conversation: str
    expected: str
    found: str
    runtime: bool  # the artefact's template gives the checkpoint's text in transformers: its own engine does not


@dataclass(frozen=True)
class ChatComparison:
    """How many conversations were compared, and those that differ."""

    conversations: int
    differences: tuple[Difference, ...]


def taken(own: Template) -> list[tuple[Conversation, str]]:
    """The conversations that a template has a layout for, with that layout.

    Not those that it refuses or makes nothing of, nor those with tools or a content in parts where it knows nothing of
    these: engines then make up something. Where it takes no plain text at all, all are asked for in parts.
    """
    found = _taken(own, CONVERSATIONS)
    if any(conversation.plain for conversation, _ in found):
        return found
    return _taken(own, [conversation.in_parts() for conversation in CONVERSATIONS])


def refusal(own: Template) -> str:
    """What a template makes of a question in plain text that it has no layout for, in words."""
    (text,) = own.render([CONVERSATIONS[0].layout()])
    return text.removeprefix(REFUSED) if text.strip() else "it lays out nothing"


def _taken(own: Template, conversations: Sequence[Conversation]) -> list[tuple[Conversation, str]]:
    layouts = [conversation.layout() for conversation in conversations]
    plain: list[Layout] = [{**layout, "tools": []} for layout in layouts if layout["tools"]]
    texts = own.render([*layouts, *plain])
    without = iter(texts[len(layouts) :])
    found = []
    for conversation, text in zip(conversations, texts, strict=False):
        ignored = bool(conversation.tools) and next(without) == text
        if text.strip() and not (text.startswith(REFUSED) or ignored or _AS_PYTHON in text):
            found.append((conversation, text))
    return found


def compare(
    expected: Sequence[tuple[Conversation, str]], found: Sequence[str], read_back: Sequence[str] | None
) -> ChatComparison:
    """The checkpoint's layouts against an engine's, one by one.

    `read_back` is what transformers makes of the artefact's template: where that is the checkpoint's layout, a
    difference is the engine's own.
    """
    differences = []
    for i, ((conversation, text), other) in enumerate(zip(expected, found, strict=True)):
        if text != other:
            right = read_back is not None and read_back[i] == text
            differences.append(Difference(conversation.name, text, other, right))
    return ChatComparison(len(expected), tuple(differences))


def dumps(layouts: Sequence[Layout]) -> str:
    """Layouts as JSON, for an engine in another process."""
    return json.dumps([dict(layout) for layout in layouts])
