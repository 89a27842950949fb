"""ONNX artefacts in ONNX Runtime on the CPU: one graph with free sizes, or the three of fixed size made for an NPU.

The last tokens of every sequence go one at a time, so that what decoding does is judged along with what a prompt does.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gemexport.formats.onnx import EMBEDDING_OUTPUT, graph_files, read_model
from gemexport.formats.storage.errors import InputError
from gemexport.validators.checks.habits import Habits
from gemexport.validators.checks.layers import in_order
from gemexport.validators.runtimes import genai
from gemexport.validators.runtimes.onnx_traits import traits
from gemexport.validators.runtimes.protocol import Laps, Layout, Logits

if TYPE_CHECKING:
    import onnx_ir as ir

CHUNK = 256  # tokens of a prompt at once where sizes are free
SHOWN = "gemexport.layer."  # outputs that copies of graphs have besides their own
SINGLE = 8  # tokens at the end of a sequence that go one at a time
NPU_GRAPHS = ("embeddings", "prefill", "decode")
NUMPY_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
    "tensor(int16)": np.int16, "tensor(uint16)": np.uint16,
}  # fmt: skip

Cache = dict[str, NDArray[Any]]


def load(path: Path, *, threads: int, context: int, frugal: bool = False) -> OnnxModel | NpuModel:
    """The artefact in the folder `path`, or the .onnx file `path`; `frugal` holds one decoder of an NPU's at a time.

    Raises InputError when ONNX Runtime cannot load it, or when it holds fewer than `context` positions.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and all((path / f"{name}.onnx").is_file() for name in NPU_GRAPHS):
        files = {name: path / f"{name}.onnx" for name in NPU_GRAPHS}
        return NpuModel(folder, files, context, lambda _, file: cpu_session(file, threads), frugal)
    file = graph_files(path)[0] if path.exists() else path
    if file.stem in NPU_GRAPHS or not file.is_file():
        raise InputError(path, "there is no model.onnx", "give an .onnx file or the folder of one")
    if EMBEDDING_OUTPUT in {value.name for value in read_model(file).graph.outputs}:
        from gemexport.validators.runtimes.onnx_encoder import OnnxEncoder  # which is made of what is here

        return OnnxEncoder(file, threads, folder)
    return OnnxModel(file, threads, folder)


class Input(Protocol):
    """An input or output of a graph."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Sequence[Any]: ...
    @property
    def type(self) -> str: ...


class Session(Protocol):
    """A graph that runs: ONNX Runtime's InferenceSession, or what computes in its place."""

    def get_inputs(self) -> Sequence[Input]: ...
    def get_outputs(self) -> Sequence[Input]: ...
    def run(self, names: Sequence[str] | None, feeds: Mapping[str, NDArray[Any]], /) -> list[Any]: ...


OpenGraph = Callable[[str, Path], Session]  # by the graph's name and file


def cpu_session(file: Path, threads: int, model: bytes | None = None) -> onnxruntime.InferenceSession:
    """A graph on the CPU, computing what its operators say; InputError when ONNX Runtime cannot load it.

    `model` is read in place of the file, whose folder has the weights.
    """
    as_written = traits([file]).arithmetic == "static-activations"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # it would keep the room of the largest logits
    # Threads that spin while they wait take the cores of whatever else is validated at the same time.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without VNNI the 8-bit kernels saturate; and fused DequantizeLinear would quantize activations to 8 bit.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # Rounded activations in f32, as the graph says: fused with INT8 weights in blocks they end in an operator that
    # ONNX Runtime 1.32 cannot run.
    options.add_session_config_entry("session.disable_quant_qdq", str(int(as_written)))
    if model is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    try:
        return onnxruntime.InferenceSession(model or file, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise InputError(file, f"ONNX Runtime does not load it ({reason})", "export it again") from error


class _Model(ABC):
    """What both kinds have in common."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.name = f"ONNX Runtime {onnxruntime.__version__}"
        self.folder = folder
        self.traits = traits(files)
        self.arithmetic = self.traits.arithmetic
        self.single = SINGLE
        self.laps = Laps()
        if genai.runs(folder):
            self.name += f", {genai.name()}"

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Logits `[n, vocabulary]`, from an empty cache."""
        found: NDArray[np.float32] | None = None
        filled = 0
        for rows in self._feed(self._empty(), tokens, self.single):
            if found is None:
                found = np.empty((len(tokens), rows.shape[1]), np.float32)
            found[filled : filled + len(rows)] = rows
            filled += len(rows)
        assert found is not None
        return found

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` most likely next tokens, one by one."""
        cache = self._empty()
        for row in self._feed(cache, tokens, 0):
            last = row[-1]
        found: list[int] = []
        while len(found) < count:
            found.append(int(last.argmax()))
            if len(found) < count:
                last = self._run(cache, found[-1:], len(tokens) + len(found) - 1)[-1]
        return found

    def hidden(self, tokens: Sequence[int]) -> list[NDArray[np.float32]] | None:
        """What goes into the first layer and what each layer gives, `[layers + 1][n, hidden]`; None for other graphs.

        Of copies of the graphs that have these values among their outputs.
        """
        self.seen: dict[str, list[NDArray[np.float32]]] = {}
        with self._shown() as names:
            if not names:
                return None
            for _ in self._feed(self._empty(), tokens, self.single):
                pass
        return [np.concatenate(self.seen[name]) for name in names]

    @contextmanager
    def _shown(self) -> Iterator[list[str]]:
        """Run graphs that show what layers give, under these names; none where they cannot be told."""
        yield []

    def _note(self, names: Sequence[str], found: Sequence[Any], padding: int = 0) -> None:
        """Keep what a graph shows of its layers."""
        for name, value in zip(names, found, strict=True):
            if name.startswith(SHOWN):
                self.seen.setdefault(name, []).append(np.asarray(value, np.float32)[0, padding:])

    def tokenize(self, text: str) -> list[int] | None:
        """Ids as onnxruntime-genai reads texts in a folder made for it, else by tokenizer.json; None without one."""
        return None if self._encode is None else self._encode(text)

    @cached_property
    def _encode(self) -> Callable[[str], list[int]] | None:
        if genai.runs(self.folder):
            return genai.encoder(self.folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            return None
        tokenizer = Tokenizer.from_file(str(file))
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)

    def habits(self) -> Habits | None:
        """What onnxruntime-genai does in a folder made for it; None for others, which have a tokenizer.json alone."""
        return genai.habits(self.folder) if genai.runs(self.folder) else None

    def chat(self, layouts: Sequence[Layout]) -> list[str] | None:
        """None: the folder's template is for whoever runs it."""
        return None

    def _feed(self, cache: Cache, tokens: Sequence[int], single: int) -> Iterator[NDArray[np.float32]]:
        """Logits of the tokens in pieces, the last `single` one at a time; `cache` is changed."""
        end = max(len(tokens) - single, 0)
        start = 0
        while start < end:
            # Where a chunk has a fixed size the odd one comes first, so that its padding lies before the prompt.
            stop = min(start + self._chunk(end - start), end)
            yield self._run(cache, tokens[start:stop], start)
            start = stop
        for at in range(end, len(tokens)):
            yield self._run(cache, tokens[at : at + 1], at)

    @abstractmethod
    def _chunk(self, left: int) -> int:
        """How many of the `left` tokens go next."""

    @abstractmethod
    def _empty(self) -> Cache:
        """A cache that nothing is in yet."""

    @abstractmethod
    def _run(self, cache: Cache, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        """Logits `[n, vocabulary]` of tokens at positions from `start` on; puts what they leave into `cache`."""


class OnnxModel(_Model):
    """One graph: input_ids, attention_mask, position_ids and past_key_values in; logits and present out."""

    def __init__(self, file: Path, threads: int, folder: Path) -> None:
        super().__init__(folder, [file])
        self.file, self.threads = file, threads
        self.session = cpu_session(file, threads)
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.outputs = [item.name for item in self.session.get_outputs()]
        self.past = {
            name: np.zeros(_past_shape(item.shape, self.traits.capacities.get(name, 0), file), NUMPY_TYPES[item.type])
            for name, item in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def close(self) -> None:
        del self.session

    @contextmanager
    def _shown(self) -> Iterator[list[str]]:
        model, names = showing(self.file)
        plain = self.session, self.outputs
        if names:
            self.session = cpu_session(self.file, self.threads, model)
            self.outputs = [item.name for item in self.session.get_outputs()]
        try:
            yield names
        finally:
            self.session, self.outputs = plain

    def _chunk(self, left: int) -> int:
        return min(left, CHUNK)

    def _empty(self) -> Cache:
        return dict(self.past)

    def _run(self, cache: Cache, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        stop = start + len(tokens)
        fed = {
            "input_ids": np.asarray(tokens, np.int64)[None],
            "attention_mask": np.ones((1, stop), np.int64),
            "position_ids": np.arange(start, stop, dtype=np.int64)[None],
        }
        with self.laps.lap(len(tokens)):
            found = self.session.run(None, {name: fed[name] for name in fed if name in self.inputs} | cache)
        self._note(self.outputs, found)
        rows: NDArray[np.float32] = _sort(cache, self.outputs, found)[0]
        return rows


def _past_shape(shape: Sequence[int | str], capacity: int, file: Path) -> tuple[int, int, int, int]:
    """The shape of an empty cache; sizes that the graph only names are in the genai_config.json beside it."""
    _, heads, _, size = shape
    if isinstance(heads, int) and isinstance(size, int):
        return 1, heads, capacity, size
    try:
        decoder = json.loads((file.parent / "genai_config.json").read_text("utf-8"))["model"]["decoder"]
        return 1, int(decoder["num_key_value_heads"]), capacity, int(decoder["head_size"])
    except (OSError, ValueError, KeyError) as error:
        problem = f"its caches have no sizes but {heads} and {size}, and no genai_config.json says what those are"
        raise InputError(file, problem, "export it with key/value heads and head sizes as numbers") from error


class NpuModel(_Model):
    """Three graphs: the lookup of any length, the decoder for a chunk of a prompt, and the decoder for one token."""

    def __init__(
        self, folder: Path, files: Mapping[str, Path], context: int, open_graph: OpenGraph, frugal: bool = False
    ) -> None:
        super().__init__(folder, list(files.values()))
        self.files, self.open_graph, self.frugal = files, open_graph, frugal
        self.sessions = {name: open_graph(name, files[name]) for name in ("embeddings", "prefill")}
        inputs = {item.name: item for item in self.sessions["prefill"].get_inputs()}
        self.length = int(inputs["position_ids"].shape[1])
        self.caches = {
            name: (tuple(item.shape), NUMPY_TYPES[item.type])
            for name, item in inputs.items()
            if name.startswith("past_")
        }
        self.context = max((shape[2] for shape, _ in self.caches.values()), default=0)
        if self.context < context:
            remedy = f"export it again with a context of {context}"
            raise InputError(folder, f"its caches hold {self.context} positions", remedy)

    @contextmanager
    def _shown(self) -> Iterator[list[str]]:
        shown = {name: showing(self.files[name]) for name in ("prefill", "decode")}
        plain = self.sessions
        if all(names for _, names in shown.values()):
            own = {name: cpu_session(self.files[name], 0, model) for name, (model, _) in shown.items()}
            self.sessions = {**plain, **own}
        try:
            yield shown["prefill"][1]
        finally:
            self.sessions = plain

    def close(self) -> None:
        self.sessions.clear()

    def _chunk(self, left: int) -> int:
        return left % self.length or self.length

    def _empty(self) -> Cache:
        return {name: np.zeros(shape, dtype) for name, (shape, dtype) in self.caches.items()}

    def _run(self, cache: Cache, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        name, length = ("decode", 1) if len(tokens) == 1 and start else ("prefill", self.length)
        if name not in self.sessions:
            if self.frugal:
                self.sessions.pop("decode" if name == "prefill" else "prefill", None)
            self.sessions[name] = self.open_graph(name, self.files[name])
        padding = length - len(tokens)
        ids = np.asarray([0] * padding + list(tokens), np.int64)[None]
        names = [item.name for item in self.sessions["embeddings"].get_outputs()]
        positions = np.arange(start - padding, start + len(tokens), dtype=np.int32)[None]
        session = self.sessions[name]
        outputs = [item.name for item in session.get_outputs()]
        with self.laps.lap(len(tokens)):
            looked_up = self.sessions["embeddings"].run(None, {"input_ids": ids})
            found = session.run(None, dict(zip(names, looked_up, strict=True)) | {"position_ids": positions} | cache)
        self._note(outputs, found, padding)
        rows: NDArray[np.float32] = _sort(cache, outputs, found)[0, padding:]
        return rows


def showing(file: Path) -> tuple[bytes, list[str]]:
    """A copy of a graph that gives what layers read as well, and the names of these outputs, in order.

    No names for a graph whose norms are not called as in a checkpoint.
    """
    import onnx_ir as ir

    model = read_model(file)
    norms: dict[str, ir.Value] = {}
    for value in model.graph.initializers.values():
        users = [use for use, _ in value.uses()]
        users += [use for user in users if user.op_type == "Add" for use, _ in user.outputs[0].uses()]
        for node in users:
            if node.op_type == "RMSNormalization" and node.inputs[0] is not None:
                norms[value.name or ""] = node.inputs[0]
    residuals = in_order(norms)
    names = []
    for index, value in enumerate(residuals):
        names.append(f"{SHOWN}{index}")
        shown = ir.Value(name=names[-1], type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, None, None]))
        model.graph.append(ir.node("Identity", [value], outputs=[shown]))
        model.graph.outputs.append(shown)
    return ir.to_proto(model).SerializeToString(), names


def _sort(cache: Cache, names: Sequence[str], found: Sequence[Any]) -> NDArray[np.float32]:
    """The logits among a graph's outputs; what it remembers goes into `cache`."""
    outputs = dict(zip(names, found, strict=True))
    cache |= {n.replace("present", "past_key_values"): outputs[n] for n in names if n.startswith("present")}
    return np.asarray(outputs["logits"], np.float32)
