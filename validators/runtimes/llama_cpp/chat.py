"""Conversations laid out by llama.cpp's own Jinja engine: `python -m gemexport.validators.runtimes.llama_cpp.chat F`.

llama.cpp's C interface knows a list of built-in templates only. The engine that users meet is in its server, which
`xllamacpp` brings along and which listens on this machine's own address here, at a port that is free. Layouts come as
JSON on stdin (validators/chat), texts go as JSON to stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemexport.validators.checks.chat import REFUSED, dumps
from gemexport.validators.runtimes.protocol import Layout, NoEngineError

CONTEXT = 64  # nothing is computed
SECONDS = 60.0  # for one answer
START = 600.0  # for all of them, and the start
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"  # a template that takes anything
WITHOUT = (
    "llama.cpp's server does not start with this chat template, which takes no plain text: give it another "
    "(--chat-template-file), or whole prompts to llama-completion"
)


def render(path: Path, layouts: Sequence[Layout], bos: str) -> list[str]:
    """Each conversation as the server lays it out, in a process of its own; REFUSED and a reason where it does not.

    `bos` is the text of what llama.cpp puts before a prompt; its engine leaves it out of what it lays out. Raises
    NoEngineError where the server starts, but not with the file's own template: it tries that on a plain text first.
    """
    done = _started(path, layouts)
    if done.returncode and not _started(path, [], PLAIN).returncode:
        raise NoEngineError(WITHOUT)
    if done.returncode:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise RuntimeError(f"llama.cpp's server ended with status {done.returncode}: {words[-1] if words else ''}")
    texts: list[str] = json.loads(done.stdout)
    return [text if text.startswith(REFUSED) else bos + text for text in texts]


def _started(path: Path, layouts: Sequence[Layout], *template: str) -> subprocess.CompletedProcess[bytes]:
    """What a process answers that starts the server, with the file's own template or this one."""
    command = [sys.executable, "-P", "-m", "gemexport.validators.runtimes.llama_cpp.chat", str(path), *template]
    return subprocess.run(command, input=dumps(layouts).encode(), capture_output=True, timeout=START, check=False)


def request(layout: Layout) -> dict[str, Any]:
    """A layout as the server's protocol has it, which is OpenAI's: arguments of calls are JSON in a string."""
    return {
        "messages": [_message(message) for message in layout["messages"]],
        **({"tools": layout["tools"]} if layout["tools"] else {}),
        "add_generation_prompt": layout["add_generation_prompt"],
        "chat_template_kwargs": {"enable_thinking": layout["thinking"]},
    }


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return dict(message)
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _server(path: str, template: str | None = None) -> Any:
    """The server, with the file's own template or this one; RuntimeError where it does not start."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.n_gpu_layers = CONTEXT, 1, 0
    params.port = 0
    params.warmup = params.fit_params = False
    params.no_extra_bufts = True  # weights stay mapped: none is read
    params.use_jinja = True
    params.prefill_assistant = False  # a conversation may end with the model's turn
    params.verbosity = -1
    if template is not None:
        params.chat_template = template
    return xllamacpp.Server(params)


def _ask(address: str, layout: Layout) -> str:
    data = json.dumps(request(layout)).encode()
    asked = urllib.request.Request(f"{address}/apply-template", data, {"Content-Type": "application/json"})
    # Straight to this machine, whatever proxy the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=SECONDS) as answer:
            return str(json.loads(answer.read())["prompt"])
    except urllib.error.HTTPError as error:
        said = json.loads(error.read()).get("error", {}).get("message", error.reason)
        return f"{REFUSED}{said}".splitlines()[0]


def main() -> None:
    """Keep stdout for the answer, whatever the server prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    layouts = json.loads(sys.stdin.read())
    server = _server(*sys.argv[1:])
    json.dump([_ask(server.listening_address, layout) for layout in layouts], answers)
    answers.close()
    os._exit(0)


if __name__ == "__main__":
    main()
