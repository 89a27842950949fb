"""report.json: what is written can be read again, refuses what it should, and its checksums are sha256sum's."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from gemexport.formats.storage.errors import InputError
from gemexport.report import checksums
from gemexport.report import schema as reports
from gemexport.report.schema import ArtifactReport, ModelReport, Report
from gemexport.shared import measured
from gemexport.shared.bound import Bound
from gemexport.shared.measured import Divergence, LogitsReport

MODEL = ModelReport(name="demo", architecture="gemma4", parameters=10, bytes=20, source="models/demo")


def with_status(*statuses: str) -> Report:
    artifacts = [ArtifactReport.model_validate({"format": "gguf", "variant": "Q4_0", "status": s}) for s in statuses]
    return Report(model=MODEL, versions={"gemexport": "0.1.0"}, artifacts=tuple(artifacts))


def logits(kld: float) -> LogitsReport:
    numbers = Divergence(kld_mean=kld, kld_max=math.inf, top1_agreement=0.5, perplexity_ratio=1.0)
    return LogitsReport(runtime="r", arithmetic="f16", tokens=3, conversion=numbers)


def test_what_is_written_is_read_again_even_what_is_not_a_number(tmp_path: Path) -> None:
    artifact = with_status("fail").artifacts[0].model_copy(update={"logits": logits(math.nan)})
    whole = with_status().model_copy(update={"artifacts": (artifact,)})
    path = reports.write_text(tmp_path / "report.json", whole.to_json())

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    again = reports.read_report(path)
    assert again.to_json() == whole.to_json()
    found = again.artifacts[0].logits
    assert found is not None
    assert found.conversion is not None
    assert math.isnan(found.conversion.kld_mean)
    assert math.isinf(found.conversion.kld_max)


def test_fields_that_others_rely_on_have_their_names(tmp_path: Path) -> None:
    artifact = with_status("pass").artifacts[0].model_copy(update={"logits": logits(0.1)})
    data = json.loads(with_status().model_copy(update={"artifacts": (artifact,)}).to_json())
    assert {"model", "versions", "artifacts"} <= data.keys()
    assert {"name", "architecture", "parameters", "bytes", "source"} <= data["model"].keys()
    top = {"format", "variant", "path", "bytes", "sha256", "status", "reason", "export", "weights", "tokenizer"}
    assert top | {"logits", "seconds"} <= data["artifacts"][0].keys()
    assert {"runtime", "tokens", "conversion", "loss"} <= data["artifacts"][0]["logits"].keys()
    divergences = {"kld_mean", "kld_error", "kld_max"}
    numbers = divergences | {
        "top1_agreement",
        "top1_but_ties",
        "changed",
        "perplexity_ratio",
        "kinds",
        "choice_mean",
        "choice_max",
    }
    assert data["artifacts"][0]["logits"]["conversion"].keys() == numbers
    assert {"compared", "exact", "exact_fraction", "max_relative_error", "tensors"} <= set(
        measured.WeightsReport.model_fields
    )
    assert {"name", "grid", "exact_fraction"} <= set(measured.TensorReport.model_fields)
    assert {"seconds", "peak_rss_bytes"} <= set(reports.ExportStats.model_fields)
    assert {"texts", "equal"} <= set(measured.TokenizerReport.model_fields)


def test_documentation_names_every_field() -> None:
    text = (Path(__file__).parents[3] / "docs" / "report.md").read_text(encoding="utf-8")
    models = [
        value
        for value in (vars(reports) | vars(measured)).values()
        if isinstance(value, type) and issubclass(value, measured.ReportModel)
    ]
    missing = [
        f"{model.__name__}.{field}" for model in models for field in model.model_fields if f"`{field}`" not in text
    ]
    assert len(models) > 10
    assert missing == []


def test_a_later_gemexports_report_can_be_read(tmp_path: Path) -> None:
    data = json.loads(with_status("pass").to_json())
    data["artifacts"][0]["invented_later"] = 1
    path = reports.write_text(tmp_path / "report.json", json.dumps(data))
    assert reports.read_report(path) == with_status("pass")


@pytest.mark.parametrize("text", ["", "[]", '{"model": {}}', "\0"])
def test_what_is_no_report_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = reports.write_text(tmp_path / "report.json", text)
    with pytest.raises(InputError) as caught:
        reports.read_report(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        reports.read_report(tmp_path / "none.json")


def test_reports_are_frozen_and_misspelt_fields_are_errors() -> None:
    with pytest.raises(ValidationError):
        setattr(MODEL, "name", "other")  # noqa: B010
    with pytest.raises(ValidationError):
        ModelReport.model_validate({**MODEL.model_dump(), "nam": "x"})


def test_a_run_is_well_unless_something_failed() -> None:
    assert with_status("pass", "written", "skipped").ok
    assert not with_status("pass", "partial").ok
    assert with_status("pass", "partial").model_copy(update={"allow_partial": True}).ok
    assert not with_status("pass", "fail").ok
    assert not with_status("error").ok


def test_a_verdict_names_every_broken_bound_and_nan_holds_none() -> None:
    held = Bound.at_most("a", 1.0, 1.0, "x")
    assert reports.verdict([held]) == ("pass", None)
    assert not Bound.at_least("b", math.nan, 0.0, "y").held
    status, reason = reports.verdict(
        [held, Bound.at_most("kld", 0.41, 1e-5, "y"), Bound.at_least("b", math.nan, 0, "z")]
    )
    assert status == "fail"
    assert reason == "kld is 0.41, not <= 1e-5 (y); b is nan, not >= 0 (z)"


def test_sums_are_what_sha256sum_reads(tmp_path: Path) -> None:
    folder = tmp_path / "mlx" / "4bit"
    folder.mkdir(parents=True)
    (folder / "weights é.safetensors").write_bytes(b"w" * 100_000)
    (folder / "back\\slash").write_bytes(b"")
    (tmp_path / "a.gguf").write_bytes(b"gguf")
    artifacts = []
    for path in (folder, tmp_path / "a.gguf"):
        files = checksums.describe_files(tmp_path, path)
        artifacts.append(with_status("pass").artifacts[0].model_copy(update={"files": files}))
    sums = checksums.write_sums(tmp_path, artifacts)
    assert len(sums.read_text().splitlines()) == 3
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=tmp_path, check=True, capture_output=True)


def test_what_a_package_is_used_with_is_summed_with_it(tmp_path: Path) -> None:
    """Core ML's tokenizer, template and settings lie beside the package; two packages of a folder share them."""
    folder = tmp_path / "coreml"
    own = ["int4.mlpackage/Manifest.json", "f16.mlpackage/Manifest.json"]
    beside = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in (*own, *beside, "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (tmp_path / "m.gguf").write_text("gguf")
    found = [checksums.describe_files(tmp_path, folder / name.split("/")[0]) for name in own]
    for name, files in zip(own, found, strict=True):
        assert [file.path for file in files] == sorted(f"coreml/{path}" for path in (name, *beside))
    row = with_status("pass").artifacts[0]
    sums = checksums.write_sums(tmp_path, [row.model_copy(update={"files": files}) for files in found])
    assert len(sums.read_text().splitlines()) == len(own) + len(beside)
    assert [file.path for file in checksums.describe_files(tmp_path, tmp_path / "m.gguf")] == ["m.gguf"]


def test_an_artefact_has_one_digest(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    single = checksums.describe_files(tmp_path, one)
    both = checksums.describe_files(tmp_path, tmp_path)
    assert checksums.artifact_sha256(single) == checksums.file_sha256(one) == single[0].sha256
    assert [file.path for file in both] == ["one", "two"]
    before = checksums.artifact_sha256(both)
    two.write_bytes(b"3")
    assert checksums.artifact_sha256(checksums.describe_files(tmp_path, tmp_path)) != before


def test_versions_are_those_installed_in_order() -> None:
    found = reports.package_versions()
    assert list(found) == sorted(found)
    assert found["gemexport"]
