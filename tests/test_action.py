"""The GitHub Action: its structure, each of its shell steps as it stands, and (slowly) all of them on the demo model.

The steps are taken from action.yml, expressions are filled in as GitHub does, and bash is called the way a runner
calls it. Steps that use another action need GitHub; what they are given is checked instead.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@dataclass
class Runner:
    """What a GitHub runner holds while the steps of a composite action run."""

    home: Path
    action: Path = ROOT
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        defaults = {name: str(spec.get("default", "")) for name, spec in ACTION["inputs"].items()}
        self.inputs = defaults | self.inputs
        self.workspace.mkdir(parents=True)
        (self.home / "temp").mkdir()

    @property
    def workspace(self) -> Path:
        """Where a job's steps start."""
        return self.home / "work"

    @property
    def summary(self) -> Path:
        """The job summary."""
        return self.home / "summary.md"

    def fill(self, text: str) -> str:
        """Replace the expressions that action.yml uses; a KeyError for one that refers to nothing."""

        def value(found: re.Match[str]) -> str:
            match found[1].split("."):
                case ["inputs", name]:
                    return self.inputs[name]
                case ["steps", step, "outputs", name]:
                    return self.outputs[step][name]
            raise KeyError(found[1])

        return re.sub(r"\$\{\{\s*(.+?)\s*\}\}", value, text)

    def run(self, step: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        """One shell step, as it stands."""
        script, output = self.home / "step.sh", self.home / "output"
        script.write_text(self.fill(step["run"]), encoding="utf-8")
        output.write_text("")
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RUNNER_OS": "macOS" if sys.platform == "darwin" else "Linux",
            "RUNNER_TEMP": str(self.home / "temp"),
            "GITHUB_ACTION_PATH": str(self.action),
            "GITHUB_WORKSPACE": str(self.workspace),
            "GITHUB_OUTPUT": str(output),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            **{name: self.fill(str(text)) for name, text in step.get("env", {}).items()},
        }
        assert step["shell"] == "bash"
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=self.workspace, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        pairs = [line.split("=", 1) for line in output.read_text().splitlines()]
        self.outputs[step.get("id", step["name"])] = {pair[0]: pair[1] for pair in pairs}
        return done


def step(name: str) -> dict[str, Any]:
    """The step of action.yml whose name starts so."""
    return next(item for item in STEPS if item["name"].startswith(name))


def used(node: object) -> list[str]:
    """Every `uses:` below a node of YAML."""
    if isinstance(node, dict):
        here = [str(node["uses"])] if "uses" in node else []
        return here + [name for value in node.values() for name in used(value)]
    return [name for value in node for name in used(value)] if isinstance(node, list) else []


@pytest.mark.parametrize("path", [ROOT / "action.yml", *WORKFLOWS], ids=lambda path: path.name)
def test_every_action_is_pinned_by_commit_and_says_which_version_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = [name for name in used(yaml.safe_load(text)) if name != "./"]
    assert names
    for name in names:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", name), name
        assert re.search(rf"{re.escape(name)} # v\d+\.\d+\.\d+\n", text), name


def test_the_same_action_is_pinned_to_the_same_commit_everywhere() -> None:
    pins: dict[str, set[str]] = {}
    for path in (ROOT / "action.yml", *WORKFLOWS):
        for name in used(yaml.safe_load(path.read_text(encoding="utf-8"))):
            if "@" in name:
                pins.setdefault(name.split("@")[0], set()).add(name)
    assert all(len(names) == 1 for names in pins.values()), pins


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_start_with_no_more_than_reading_and_give_the_action_inputs_that_it_has(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        for item in job["steps"]:
            assert "${{" not in item.get("run", ""), "an expression in a script is an injection; give it through env"
            if item.get("uses") == "./":
                assert item["with"].keys() <= ACTION["inputs"].keys()
                assert item["with"]["model"]


def test_steps_take_expressions_from_the_environment_and_refer_to_what_there_is(tmp_path: Path) -> None:
    outputs = {
        "export": dict.fromkeys(("verdict", "unjudged", "report", "output"), "x"),
        "upload": {"artifact-id": "x"},
    }
    runner = Runner(tmp_path / "home", outputs=outputs)
    for item in STEPS:
        assert "${{" not in item.get("run", "")
        for text in (item.get("env", {}) | item.get("with", {})).values():
            runner.fill(str(text))
    for output in ACTION["outputs"].values():
        assert runner.fill(output["value"]) == "x"
    assert {"model", "formats", "recipe", "output", "fail-on"} <= ACTION["inputs"].keys()
    upload = step("Upload")
    assert upload["with"]["path"] == "${{ inputs.output }}"
    assert upload["with"]["if-no-files-found"] == "error"
    assert STEPS.index(step("Verdict")) > STEPS.index(upload)


@pytest.mark.parametrize(
    ("fail_on", "allow", "verdict", "status"),
    [("fail", "false", "pass", 0), ("fail", "false", "fail", 1), ("fail", "true", "error", 1),
     ("fail", "false", "partial", 1), ("fail", "true", "partial", 0), ("error", "false", "partial", 0),
     ("error", "false", "fail", 0), ("error", "false", "error", 1), ("never", "false", "fail", 0),
     ("never", "false", "error", 0)],
)  # fmt: skip
def test_verdict(fail_on: str, allow: str, verdict: str, status: int, tmp_path: Path) -> None:
    inputs = {"fail-on": fail_on, "allow-partial": allow}
    runner = Runner(tmp_path / "home", inputs=inputs, outputs={"export": {"verdict": verdict}})
    done = runner.run(step("Verdict"))
    assert done.returncode == status
    assert ("::error" in done.stdout) == bool(status)


def stand_in(runner: Runner, status: int, *statuses: str) -> Path:
    """Put a `gemexport` that writes a report with these artefacts and exits so where the action installs its own."""
    folder = runner.home / "temp" / "gemexport" / "bin"
    folder.mkdir(parents=True)
    gap = {"part": "logits", "because": "left out", "reason": "no\nroom"}
    artifacts = [
        {"format": "gguf", "variant": "Q4_0", "status": one, "unjudged": [gap] * (one == "partial")} for one in statuses
    ]
    model = {"name": "m", "architecture": "gemma3", "parameters": 1, "bytes": 2, "source": "m"}
    report = json.dumps({"model": model, "versions": {}, "artifacts": artifacts})
    script = f"""#!/bin/sh
printf '%s\\n' "$@" > {folder}/arguments
while [ "$1" != --out ]; do shift; done
mkdir -p "$2" && cat > "$2/report.json" <<'END'
{report}
END
exit {status}
"""
    (folder / "gemexport").write_text(script)
    (folder / "gemexport").chmod(0o755)
    # A script, because a link to a virtual environment's Python leaves its packages behind.
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    return folder / "arguments"


@pytest.mark.parametrize(
    ("status", "statuses", "verdict"),
    [
        (0, ("pass", "written", "skipped"), "pass"),
        (1, ("pass", "partial"), "partial"),
        (1, ("partial", "fail"), "fail"),
        (1, ("fail", "error"), "error"),
    ],
)
def test_export_step_goes_on_when_a_validator_fails(
    status: int, statuses: tuple[str, ...], verdict: str, tmp_path: Path
) -> None:
    inputs = {"model": "my model", "formats": "gguf,mlx", "recipe": "r.toml", "output": "my out"}
    inputs |= {"allow-partial": "true"}
    runner = Runner(tmp_path / "home", inputs=inputs | {"variants": "gguf:Q8_0"})
    arguments = stand_in(runner, status, *statuses)
    done = runner.run(step("Export"))
    assert done.returncode == 0, done.stderr
    unjudged = "gguf Q4_0: logits not judged: no room" if "partial" in statuses else ""
    assert runner.outputs["export"] == {
        "verdict": verdict, "unjudged": unjudged, "report": "my out/report.json", "output": "my out"
    }  # fmt: skip
    expected = [
        "all",
        "my model",
        "--out",
        "my out",
        "--recipe",
        "r.toml",
        "--only",
        "gguf,mlx",
        "--variants",
        "gguf:Q8_0",
        "--allow-partial",
    ]
    assert arguments.read_text().splitlines() == expected


def test_export_step_stops_at_a_request_at_fault(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "home", inputs={"model": "m"})
    stand_in(runner, 2)
    assert runner.run(step("Export")).returncode == 2
    assert runner.outputs["export"] == {}
    runner.inputs["fail-on"] = "sometimes"
    done = runner.run(step("Export"))
    assert done.returncode == 2
    assert "use fail, error or never" in done.stdout


def test_export_step_takes_no_earlier_run_for_this_one(tmp_path: Path) -> None:
    """A traceback ends with 1, as a verdict does: the folder of a runner that is kept had last week's report in it."""
    runner = Runner(tmp_path / "home", inputs={"model": "m", "output": "out"})
    stand_in(runner, 0, "pass")
    assert runner.run(step("Export")).returncode == 0
    (runner.home / "temp" / "gemexport" / "bin" / "gemexport").write_text("#!/bin/sh\nexit 1\n")
    runner.outputs.clear()
    assert runner.run(step("Export")).returncode != 0
    assert runner.outputs["export"] == {}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shell_steps_satisfy_shellcheck(tmp_path: Path) -> None:
    for item in STEPS:
        if "run" in item:
            script = tmp_path / "step.sh"
            script.write_text("#!/bin/bash\n" + item["run"], encoding="utf-8")
            done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout


def test_continuous_integration_installs_and_tests_as_the_readme_says() -> None:
    readme, script = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    for command in ("pip install -c constraints.txt '.[all,dev]'", "pytest"):
        assert f".venv/bin/{command}" in readme
    lines = script.splitlines()
    assert "pip install --quiet -c constraints.txt '.[all,dev]'" in lines
    assert "pytest" in lines


@pytest.mark.slow
def test_all_steps_from_a_clean_clone_leave_a_release_folder_that_verifies(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True, capture_output=True)
    runner = Runner(tmp_path / "home", action=clone, inputs={"model": "demo", "torch-index": ""})
    for item in STEPS:
        if "run" in item:
            done = runner.run(item)
            assert done.returncode == 0, f"{item['name']}\n{done.stdout}\n{done.stderr}"
    out = runner.workspace / runner.inputs["output"]
    # What actions/upload-artifact takes: everything but hidden files.
    release = tmp_path / "linux"
    shutil.copytree(out, release, ignore=shutil.ignore_patterns(".*"))
    verify(release)
    statuses = {f"{a['format']} {a['variant']}": a["status"] for a in report(release)["artifacts"]}
    assert set(statuses.values()) == {"pass"}, statuses
    assert {name.split()[0] for name in statuses} == {"gguf", "mlx", "onnx", "coreml", "compressed-tensors"}
    assert runner.summary.read_text(encoding="utf-8") == (release / "report.md").read_text(encoding="utf-8")
    module().lay_out([release], tmp_path / "assets")
    verify(tmp_path / "assets")


def report(folder: Path) -> dict[str, Any]:
    """The report of a run."""
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def verify(folder: Path) -> None:
    """Check `SHA256SUMS` with the tool that users have."""
    tool = ["sha256sum"] if shutil.which("sha256sum") else ["shasum", "-a", "256"]
    subprocess.run([*tool, "-c", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


def module() -> ModuleType:
    """.github/release_assets.py, which is a script and not part of the package."""
    spec = importlib.util.spec_from_file_location("release_assets", ROOT / ".github" / "release_assets.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def run_folder(folder: Path, weights: bytes) -> Path:
    """An output folder with a file, a folder, a failure and the reports."""
    from gemexport.report import render
    from gemexport.report.checksums import describe_files
    from gemexport.report.schema import ArtifactReport, ModelReport, Report

    (folder / "mlx" / "4bit").mkdir(parents=True)
    (folder / "mlx" / "4bit" / "model.safetensors").write_bytes(weights * 3000)
    (folder / "mlx" / "4bit" / "config.json").write_text("{}")
    (folder / "m.gguf").write_bytes(b"gguf" * 500)
    (folder / "bad.gguf").write_bytes(b"bad")
    artifacts = tuple(
        ArtifactReport(
            format=path.split("/")[0],
            variant="v",
            path=path,
            status=status,
            files=describe_files(folder, folder / path),
        )
        for path, status in (("m.gguf", "pass"), ("mlx/4bit", "pass"), ("bad.gguf", "fail"))
    )
    model = ModelReport(name="m", architecture="gemma3", parameters=1, bytes=2, source="m")
    render.write_reports(Report(model=model, versions={}, artifacts=artifacts), folder)
    return folder


def test_release_assets_are_flat_cut_and_verify(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "linux", b"w"), run_folder(tmp_path / "macos", b"v")]
    module().lay_out(runs, tmp_path / "assets", part=1500)
    verify(tmp_path / "assets")
    names = {path.name for path in (tmp_path / "assets").iterdir()}
    assert {"m.gguf.part-000", "m.gguf.part-001", "report-linux.html", "report-macos.json", "SHA256SUMS"} <= names
    assert not any("bad" in name for name in names), "an artefact that failed is not released"
    parts = sorted((tmp_path / "assets").glob("m-mlx-4bit.tar.part-*"))
    assert all(0 < part.stat().st_size <= 1500 for part in parts)
    joined = tmp_path / "m-mlx-4bit.tar"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(joined) as archive:
        assert archive.getnames() == ["4bit/config.json", "4bit/model.safetensors"]
        member = archive.extractfile("4bit/model.safetensors")
        assert member is not None
        assert member.read() == b"w" * 3000
    notes = (tmp_path / "assets" / "release-notes.md").read_text(encoding="utf-8")
    assert "3 of 4 files have the same bytes as on linux" in notes
    assert "`mlx/4bit/model.safetensors` differs" in notes


def test_release_assets_hold_what_a_package_is_used_with(tmp_path: Path, tiny_gemma3: Path) -> None:
    """Core ML's tokenizer and settings lie beside the package, and are of no use apart from it."""
    import gemexport

    out = tmp_path / "out"
    gemexport.export(tiny_gemma3, out, formats=["coreml"], validate=False)
    verify(out)
    summed = {line.split("  ", 1)[1] for line in (out / "SHA256SUMS").read_text(encoding="utf-8").splitlines()}
    lying = {path.relative_to(out).as_posix() for path in (out / "coreml").rglob("*") if path.is_file()}
    assert summed == lying
    assert {"coreml/tokenizer.json", "coreml/tokenizer_config.json", "coreml/generation_config.json"} < summed
    module().lay_out([out], tmp_path / "assets")
    with tarfile.open(next((tmp_path / "assets").glob("*.tar"))) as archive:
        assert {f"coreml/{name}" for name in archive.getnames()} == summed


def test_release_assets_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "linux", b"w")
    module().lay_out([run], tmp_path / "one")
    module().lay_out([run], tmp_path / "two")
    assert (tmp_path / "one" / "SHA256SUMS").read_text() == (tmp_path / "two" / "SHA256SUMS").read_text()
    assert (tmp_path / "one" / "m.gguf").is_file()
    assert (tmp_path / "one" / "m-mlx-4bit.tar").is_file()
