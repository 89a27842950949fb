"""Chat templates: what is compared, that a changed one is named, and llama.cpp's own engine."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gemexport.exporters import gguf
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.validators.checks.chat import (
    CONVERSATIONS,
    REFUSED,
    Template,
    apply,
    compare,
    laid_out,
    refusal,
    taken,
    template,
)
from gemexport.validators.runtimes import llama_cpp
from gemexport.validators.runtimes.llama_cpp import chat as llama_chat
from gemexport.validators.runtimes.protocol import NoEngineError

# Knows system turns, tools, calls, results, parts and thinking: as much as a real one, in little.
KNOWING = (
    "{{ bos_token }}"
    "{% if tools %}{{ '<tools>' + (tools | map(attribute='function.name') | join(',')) + '\n' }}{% endif %}"
    "{% if enable_thinking %}<think>\n{% endif %}{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{% if m.content is string %}{{ m.content | trim }}"
    "{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({% for k, v in c.function.arguments | dictsort %}"
    "{{ k }}={{ v }};{% endfor %}){% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)


def test_a_template_that_knows_all_takes_all() -> None:
    found = {conversation.name: text for conversation, text in taken(Template(KNOWING, {"bos_token": "<bos>"}))}
    assert len(found) == len(CONVERSATIONS) == len({conversation.name for conversation in CONVERSATIONS})
    assert found["tool called"].startswith("<bos><tools>get_weather,search\n<user>Will it rain in Zürich")
    assert "get_weather(city=Zürich;days=1;)" in found["tool called"]
    assert [name for name in found if "<think>" in found[name]] == [
        item.name for item in CONVERSATIONS if item.thinking
    ]
    assert [name for name in found if found[name].endswith("<model>")] == [
        item.name for item in CONVERSATIONS if item.answer
    ]


def test_a_template_is_not_asked_for_what_it_does_not_know(tiny_gemma4: Path) -> None:
    own = template(tiny_gemma4)
    assert own is not None
    names = {conversation.name for conversation, _ in taken(own)}
    assert {"user", "system", "several turns", "thinking"} <= names
    assert not names & {"tools", "tool called", "parts"}
    strict = Template("{{ raise_exception('no') if messages[0].role == 'system' }}{{ messages | length }}", {})
    assert not {conversation.name for conversation, _ in taken(strict)} & {"system", "thinking, system"}


PARTS_ALONE = (
    "{% if messages[0].content is string %}{{ raise_exception('parts, please') }}{% endif %}"
    "{% for m in messages %}{{ m.content[0].text + '' }}{% endfor %}"
)


def test_a_template_that_takes_no_plain_text_is_asked_in_parts() -> None:
    strict = Template(PARTS_ALONE, {})
    found = {conversation.name: text for conversation, text in taken(strict)}
    assert {"user", "system", "parts"} <= found.keys()
    assert found["user"] == "What is the capital of France?"
    assert refusal(strict) == "parts, please"


@pytest.mark.parametrize("source", ["", " \n", "{{ raise_exception('never') }}"])
def test_a_template_that_lays_out_nothing_takes_nothing(source: str) -> None:
    assert taken(Template(source, {})) == []
    assert refusal(Template(source, {})) == ("never" if "never" in source else "it lays out nothing")


def test_a_changed_role_marker_is_named() -> None:
    own, other = Template(KNOWING, {}), Template(KNOWING.replace("'<' + m.role", "'< ' + m.role"), {})
    expected = taken(own)
    wrong = other.render([conversation.layout() for conversation, _ in expected])
    found = compare(expected, wrong, wrong)
    assert found.conversations == len(found.differences) == len(CONVERSATIONS)
    assert not any(difference.runtime for difference in found.differences)
    assert compare(expected, [text for _, text in expected], None).differences == ()


def test_an_engine_that_errs_with_the_right_template_is_told_apart() -> None:
    own = Template(KNOWING, {})
    expected = taken(own)
    texts = [text for _, text in expected]
    (difference,) = compare(expected, ["!", *texts[1:]], texts).differences
    assert (difference.conversation, difference.found, difference.runtime) == ("user", "!", True)


def test_a_refusal_is_an_answer() -> None:
    def refuse(*_: object, **__: object) -> str:
        raise ValueError("no\ntemplate")

    assert apply(refuse, CONVERSATIONS[0].layout()) == f"{REFUSED}no"


def test_templates_come_from_any_place(tmp_path: Path) -> None:
    assert template(tmp_path) is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    settings = {"chat_template": named, "bos_token": {"content": "<b>"}, "eos_token": "<e>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert template(tmp_path) == Template("d", {"bos_token": "<b>", "eos_token": "<e>"})
    (tmp_path / "chat_template.jinja").write_text("f")
    found = template(tmp_path)
    assert found is not None
    assert found.source == "f"


@pytest.mark.parametrize("source", [None, KNOWING])
def test_llama_cpps_engine_lays_out_the_same(tiny_gemma4: Path, tmp_path: Path, source: str | None) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_gemma4, folder)
    if source:
        (folder / "chat_template.jinja").write_text(source)
    file = gguf.export(open_checkpoint(folder), tmp_path / "m.gguf", variant="BF16").path
    own = template(folder)
    assert own is not None
    # What llama.cpp makes of parts and of tools depends on what it finds out about a template: only real ones do here.
    expected = [(item, text) for item, text in taken(own) if not item.tools and item.name != "parts"]
    runtime = llama_cpp.load(file, threads=1, context=64)
    try:
        texts = runtime.chat([conversation.layout() for conversation, _ in expected])
    finally:
        runtime.close()
    assert texts is not None
    assert compare(expected, texts, None).differences == ()


def test_calls_are_json_in_a_string_for_llama_cpp() -> None:
    called = next(conversation for conversation in CONVERSATIONS if conversation.name == "tool called")
    message = llama_chat.request(called.layout())["messages"][1]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "Zürich", "days": 1}
    assert isinstance(called.layout()["messages"][1]["tool_calls"][0]["function"]["arguments"], dict)


def test_a_server_that_dies_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(RuntimeError, match="status"):
        llama_chat.render(tmp_path / "x.gguf", [CONVERSATIONS[0].layout()], "")


@pytest.mark.parametrize(
    ("source", "limit"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 5 s"),
        ("{{ 'x' * 999999999 }}{{ ('y' * 99999999) ~ ('z' * 99999999) }}", "takes more than 512 MB"),
        ("{% for i in range(9999) %}{{ 'xxxxxxxxxx' * 60 }}{% endfor %}", "makes more than 16 MB"),
    ],
)
@pytest.mark.parametrize("when", ["", "{% if tools %}"])
def test_no_template_takes_more_than_its_limits(source: str, limit: str, when: str, tmp_path: Path) -> None:
    """Whatever the conversation is in which it begins to."""
    hungry = f"{when}{source}{'{% endif %}' if when else ''}{{{{ messages | length }}}}"
    (tmp_path / "chat_template.jinja").write_text(hungry)
    own = template(tmp_path)
    assert own is not None
    with pytest.raises(InputError, match=f"{tmp_path}: the chat template {limit} to lay out conversations; use the"):
        taken(own)


def test_conversations_of_calibration_are_laid_out_by_the_template_or_are_words_alone(tiny_gemma4: Path) -> None:
    talks = [[("user", "One?"), ("assistant", "Two.")], [("assistant", "No user."), ("user", "Begins.")]]
    own = template(tiny_gemma4)
    assert own is not None
    first, _ = laid_out(own, talks)
    assert "One?" in first
    assert "Two." in first
    assert len(first) > len("One?\n\nTwo.")
    refusing = replace(own, source="{{ raise_exception('no') }}")
    for other in (None, refusing):
        assert laid_out(other, talks) == ["One?\n\nTwo.", "No user.\n\nBegins."]


# Google's for TranslateGemma, in little: one typed item with language codes, or nothing.
TRANSLATING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' and (m.content is string or m.content | length != 1 "
    "or not m.content[0].source_lang_code) %}{{ raise_exception('one item with language codes') }}{% endif %}"
    "<{{ m.role }}>{{ m.content[0].source_lang_code }}-{{ m.content[0].target_lang_code }}: {{ m.content[0].text }}"
    "{% endfor %}"
)


def test_a_template_that_takes_no_plain_text_is_judged_on_what_it_takes(tiny_gemma4: Path, tmp_path: Path) -> None:
    """llama.cpp's server tries a plain text when it starts: with such a template it does not, with another it would."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_gemma4, folder)
    (folder / "chat_template.jinja").write_text(TRANSLATING)
    own = template(folder)
    assert own is not None
    assert [(item.name, text) for item, text in taken(own)] == [
        ("one item with languages", "<bos><user>en-de: Good morning.")
    ]
    file = gguf.export(open_checkpoint(folder), tmp_path / "m.gguf", variant="BF16").path
    with pytest.raises(NoEngineError, match="--chat-template-file"):
        llama_chat.render(file, [CONVERSATIONS[0].layout()], "")
