"""Programs of others run the folders as they stand, and go on as the model does: Optimum, transformers.js.

Each lies in an environment of its own, made here: Optimum's pins are not ours, and transformers.js is for node.
(onnxruntime-genai and OpenVINO: tests/validators/runtimes.)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import tokenizers

from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.registry import recognise

export = pytest.importorskip("gemexport.exporters.onnx").export
adapter = pytest.importorskip("gemexport.validators.runtimes.onnxruntime")
tensors = pytest.importorskip("gemexport.formats.onnx").tensors

PROMPT, COUNT = "Hello there, this is", 12
OPTIMUM = ("optimum==2.1.0", "optimum-onnx==0.1.0")
TRANSFORMERS_JS = "@huggingface/transformers@4.3.2"
GENERATE_PY = """
import json, sys
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
folder, prompt, count, where = sys.argv[1:]
model = ORTModelForCausalLM.from_pretrained(folder, **json.loads(where))
inputs = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
print(json.dumps(model.generate(**inputs, max_new_tokens=int(count), do_sample=False)[0].tolist()))
"""
GENERATE_JS = """
import { AutoModelForCausalLM, AutoTokenizer, env } from '@huggingface/transformers';
env.allowRemoteModels = false;
const [folder, prompt, count, where] = process.argv.slice(2);
const model = await AutoModelForCausalLM.from_pretrained(folder, JSON.parse(where));
const inputs = await (await AutoTokenizer.from_pretrained(folder))(prompt);
const found = await model.generate({ ...inputs, max_new_tokens: Number(count), do_sample: false });
console.log(JSON.stringify(found.tolist()[0].map(Number)));
"""


@pytest.fixture(scope="module")
def checkpoint(gemma3: Checkpoint) -> Checkpoint:
    return gemma3


def installed(command: list[str], cwd: Path, what: str) -> None:
    """Run an installer; skip the test where it does not come to an end."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{what} did not install in ten minutes")
    if done.returncode:
        pytest.skip(f"{what} does not install here: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")


@pytest.fixture(scope="module")
def optimum(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that generates with Optimum: in a new environment over this one, whose PyTorch it takes."""
    folder = tmp_path_factory.mktemp("optimum")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    here = [path for path in sys.path if path.endswith("-packages")]
    (own / "zz-here.pth").write_text("\n".join(here) + "\n")
    installed([str(python), "-m", "pip", "install", "-q", *OPTIMUM], folder, "Optimum")
    (folder / "generate.py").write_text(GENERATE_PY)
    return [str(python), str(folder / "generate.py")]


@pytest.fixture(scope="module")
def transformers_js(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that generates with transformers.js."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("there is no node with npm")
    folder = tmp_path_factory.mktemp("transformers-js")
    # Scripts of packages would download a CUDA runtime from elsewhere.
    installed(
        [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", TRANSFORMERS_JS], folder, "transformers.js"
    )
    (folder / "generate.mjs").write_text(GENERATE_JS)
    return [node, str(folder / "generate.mjs")]


def goes_on(command: list[str], path: Path, **where: object) -> None:
    """The program's tokens are the prompt's with BOS, and then those of the graph in ONNX Runtime."""
    arguments = [str(path), PROMPT, str(COUNT), json.dumps(where)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    prompt = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode(PROMPT).ids
    found = json.loads(done.stdout.splitlines()[-1])
    expected = adapter.load(path, threads=1, context=64).greedy(prompt, COUNT)
    assert len(found) > len(prompt)
    assert found == [*prompt, *expected][: len(found)]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["int4", "f32"])
def test_optimum_generates(optimum: list[str], checkpoint: Checkpoint, tmp_path: Path, variant: str) -> None:
    goes_on(optimum, export(checkpoint, tmp_path / variant, variant=variant).path)
    other = export(checkpoint, tmp_path / "js", variant=variant, layout="transformers.js").path
    goes_on(optimum, other, file_name=next((other / "onnx").glob("*.onnx")).name)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["int4", "f32"])
def test_transformers_js_generates(
    transformers_js: list[str], checkpoint: Checkpoint, tmp_path: Path, variant: str
) -> None:
    """From the folder as it stands, told where the graph is, and from its own layout, told nothing."""
    goes_on(transformers_js, export(checkpoint, tmp_path / variant, variant=variant).path, subfolder="", dtype="fp32")
    goes_on(transformers_js, export(checkpoint, tmp_path / "js", variant=variant, layout="transformers.js").path)


@pytest.mark.parametrize("variant", ["int4", "f32"])
def test_the_layout_of_transformers_js_is_the_same_model(checkpoint: Checkpoint, tmp_path: Path, variant: str) -> None:
    """The same graph over the same bytes, which the validator, the script and onnxruntime-genai find as well."""
    flat = export(checkpoint, tmp_path / "flat", variant=variant)
    made = export(checkpoint, tmp_path / "js", variant=variant, layout="transformers.js")
    name = {"int4": "model_q4.onnx", "f32": "model.onnx"}[variant]
    assert made.path / "onnx" / f"{name}_data" in made.files
    assert not list(made.path.glob("*.onnx*"))
    data = [flat.path / "model.onnx.data", made.path / "onnx" / f"{name}_data"]
    assert data[0].read_bytes() == data[1].read_bytes()
    assert recognise(made.path).name == "onnx"
    for key, wanted in tensors(flat.path).items():
        assert (tensors(made.path)[key].numpy() == wanted.numpy()).all()
    tokens = list(range(20, 50))
    first, second = (adapter.load(item.path, threads=1, context=64).logits(tokens) for item in (flat, made))
    assert (first == second).all()
    said = [
        subprocess.run([sys.executable, "-I", item.path / "generate.py", PROMPT, "9"], capture_output=True, check=True)
        for item in (flat, made)
    ]
    assert said[0].stdout == said[1].stdout
    again = export(checkpoint, tmp_path / "again", variant=variant, layout="transformers.js")
    assert [file.read_bytes() for file in again.files] == [file.read_bytes() for file in made.files]
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(made.path))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=40, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(tokens)
    generator.generate_next_token()
    assert int(generator.get_next_tokens()[0]) == int(first[-1].argmax())


def test_a_layout_that_cannot_be_is_refused(checkpoint: Checkpoint, tiny_gemma4: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no layout round"):
        export(checkpoint, tmp_path / "a", layout="round")
    with pytest.raises(InputError, match=r"has no layout for transformers\.js"):
        export(checkpoint, tmp_path / "a", variant="npu", layout="transformers.js")
    with pytest.raises(InputError, match="does not run gemma4_text in one graph"):
        export(open_checkpoint(tiny_gemma4), tmp_path / "a", layout="transformers.js")
    assert not (tmp_path / "a").exists()


def test_of_several_models_one_has_to_be_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    made = export(checkpoint, tmp_path / "js", layout="transformers.js").path
    shutil.copyfile(made / "onnx" / "model_q4.onnx", made / "onnx" / "model_fp16.onnx")
    with pytest.raises(InputError, match="there are 2 models in onnx"):
        tensors(made)
