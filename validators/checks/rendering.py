"""Conversations laid out by a chat template as transformers lays them out, in a process with limits.

A template is a program that a stranger wrote: in Jinja's sandbox it does no harm but by taking time and memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from gemexport.validators.checks.chat import REFUSED


def answer(argument: Mapping[str, Any]) -> list[str]:
    """A text for each of the `layouts`; REFUSED and the reason for those that the template `source` does not take."""
    return [_text(argument["source"], argument["tokens"], layout) for layout in argument["layouts"]]


def _text(source: str, tokens: Mapping[str, Any], layout: Mapping[str, Any]) -> str:
    try:
        found: Any = render_jinja_template(
            conversations=[layout["messages"]],
            tools=layout["tools"] or None,
            chat_template=source,
            add_generation_prompt=layout["add_generation_prompt"],
            enable_thinking=layout["thinking"],
            **tokens,
        )
    except MemoryError:
        raise
    except Exception as error:  # a template may raise anything, and refuses conversations by raising
        return f"{REFUSED}{error}".splitlines()[0]
    texts = found[0] if isinstance(found, tuple) else found
    return str(texts[0])
