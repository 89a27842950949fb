"""report.junit.xml: what continuous integration will count, and text that XML cannot hold."""

from __future__ import annotations

import math
from xml.etree import ElementTree

from gemexport.report.junit import render_junit
from gemexport.report.schema import ArtifactReport, ModelReport, Report
from gemexport.shared.bound import Bound
from gemexport.shared.measured import UnjudgedReport

HELD = Bound.at_least("tokenizer.equal", 40, 40, "every text")
MODEL = ModelReport(name="m", architecture="gemma3", parameters=1, bytes=2, source="m")
BROKEN = Bound.at_most("conversion.kld_mean in f32", math.nan, 1e-5, "two right <implementations>")


def suites(*artifacts: ArtifactReport, name: str = "m") -> ElementTree.Element:
    model = MODEL.model_copy(update={"name": name})
    text = render_junit(Report(model=model, versions={}, artifacts=artifacts, seconds=2.5))
    return ElementTree.fromstring(text)


def artifact(**more: object) -> ArtifactReport:
    return ArtifactReport.model_validate({"format": "gguf", "variant": "Q4_0", "status": "pass", **more})


def counts(element: ElementTree.Element) -> list[int]:
    return [int(element.attrib[key]) for key in ("tests", "failures", "errors", "skipped")]


def test_every_bound_is_a_case_and_a_broken_one_says_why() -> None:
    found = suites(artifact(bounds=(HELD, BROKEN), status="fail", reason=str(BROKEN), seconds=1.25))
    (suite,) = found
    assert (suite.attrib["name"], suite.attrib["time"]) == ("gguf Q4_0", "1.250")
    assert counts(found) == counts(suite) == [2, 1, 0, 0]
    held, broken = suite
    assert (held.attrib["classname"], held.attrib["name"]) == ("gemexport.gguf.Q4_0", "tokenizer.equal")
    assert len(held) == 0
    assert broken[0].tag == "failure"
    assert broken[0].attrib["message"] == str(BROKEN) == broken[0].text


def test_what_ended_without_bounds_is_a_case_of_its_own() -> None:
    found = suites(
        artifact(status="error", reason="it stopped"),
        artifact(status="written", reason="not validated"),
        artifact(status="fail", reason="layer 3 departs", bounds=(HELD,)),
        artifact(),
    )
    assert counts(found) == [5, 1, 1, 1]
    assert [[case.attrib["name"] for case in suite] for suite in found] == [
        ["verdict"], ["verdict"], ["tokenizer.equal", "verdict"], ["verdict"],
    ]  # fmt: skip
    assert [result.attrib["message"] for result in found.iterfind(".//testcase/*")] == [
        "it stopped", "not validated", "layer 3 departs",
    ]  # fmt: skip


def test_what_was_not_judged_is_a_case_that_fails_unless_it_is_allowed() -> None:
    unjudged = (
        UnjudgedReport(part="logits", because="left out", reason="no room"),
        UnjudgedReport(part="chat", because="crashed", reason="KeyError: 'x'"),
    )
    found = artifact(status="error", bounds=(HELD,), unjudged=unjudged)
    kinds = {}
    for allowed in (False, True):
        text = render_junit(Report(model=MODEL, versions={}, artifacts=(found,), allow_partial=allowed))
        (suite,) = ElementTree.fromstring(text)
        kinds[allowed] = [(case.attrib["name"], [result.tag for result in case]) for case in suite]
    assert kinds == {
        allowed: [("tokenizer.equal", []), ("logits judged", [left_out]), ("chat judged", ["error"])]
        for allowed, left_out in ((False, "failure"), (True, "skipped"))
    }


def test_a_metric_that_comes_twice_has_two_names() -> None:
    found = suites(artifact(bounds=(HELD, HELD)))
    assert [case.attrib["name"] for case in found[0]] == ["tokenizer.equal", "tokenizer.equal (2)"]


def test_text_from_outside_stays_xml() -> None:
    found = suites(artifact(status="error", reason="\x1b[0m \x00 ]]> & <b> \ud800"), name='<m "\x07">')
    assert found.attrib["name"] == 'gemexport: <m "\ufffd">'
    assert found[0][0][0].attrib["message"] == "\ufffd[0m \ufffd ]]> & <b> \ufffd"
