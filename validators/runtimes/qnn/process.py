"""The process that compiles graphs for Qualcomm's HTP, for validators/qnn.

Its arguments are the folder to write to, whether the graphs `share` a binary or are `apart`, the provider's options as
JSON, and the graphs. The compiler says why it refuses an operator in its log alone, which goes to stderr; a line
`== NAME` there begins each graph's part. Answers are JSON lines on stdout, one a graph.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MARK = "== "
VERBOSE, QUIET = 0, 3


def htp_session(
    file: Path, options: dict[str, str], entries: dict[str, str] | None = None, *, severity: int = QUIET
) -> Any:
    """A graph on the HTP's emulator, or a context binary's; what the HTP does not take is an error.

    `options` are the provider's (`htp_arch`, `soc_model`), `entries` the session's.
    """
    import onnxruntime
    import onnxruntime_qnn

    name = onnxruntime_qnn.get_ep_name()
    if not any(device.ep_name == name for device in onnxruntime.get_ep_devices()):
        onnxruntime.register_execution_provider_library(name, onnxruntime_qnn.get_library_path())
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = severity
    for key, value in {"session.disable_cpu_ep_fallback": "1", **(entries or {})}.items():
        settings.add_session_config_entry(key, value)
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    # Quantizing inputs and dequantizing outputs would else be left to the CPU, which is not there.
    always = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "offload_graph_io_quantization": "0"}
    settings.add_provider_for_devices(devices, {**always, **options})
    return onnxruntime.InferenceSession(file, settings)


def compile_graphs(out: Path, options: dict[str, str], files: list[Path], share: bool) -> list[dict[str, Any]]:
    """Compile each graph into a context binary in `out`, of its own or one for all; what became of each."""
    answers, sessions = [], []
    for number, file in enumerate(files):
        print(f"{MARK}{file.stem}", file=sys.stderr, flush=True)
        entries = {
            "ep.context_enable": "1",
            "ep.context_file_path": str(out / file.name),
            "ep.context_embed_mode": "0",
        }
        if share:
            entries["ep.share_ep_contexts"] = "1"
            entries["ep.stop_share_ep_contexts"] = str(int(number == len(files) - 1))
        started, error = time.monotonic(), None
        try:
            sessions.append(htp_session(file, options, entries, severity=VERBOSE))
        except Exception as caught:  # ONNX Runtime's own kinds, for refusals as for what the compiler breaks on
            error = str(caught).splitlines()[0]
        answers.append({"graph": file.stem, "seconds": time.monotonic() - started, "error": error})
    return answers


def main() -> None:
    """Keep stdout for answers; the provider's libraries print there as well."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    out, share, options, *files = sys.argv[1:]
    for answer in compile_graphs(Path(out), json.loads(options), [Path(file) for file in files], share == "share"):
        print(json.dumps(answer), file=answers, flush=True)
    answers.close()
    os._exit(0)


if __name__ == "__main__":
    main()
