"""The verdicts as JUnit XML, which continuous integration shows beside the tests: a suite an artefact, a case a bound.

JUnit has no schema of its own; elements and attributes are those of Ant's JUnitReport, which every reader knows.
"""

from __future__ import annotations

import re
from collections import Counter
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from gemexport.report.schema import ArtifactReport, Report

# What XML 1.0 cannot hold, not even escaped (section 2.2): most control characters, surrogates.
_UNWRITABLE = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# What a status is that no case has told yet.
_KINDS = {"partial": "failure", "fail": "failure", "error": "error", "written": "skipped", "skipped": "skipped"}


def render_junit(report: Report) -> str:
    """JUnit XML of a run: every bound of every artefact is a test case, failures with their reason."""
    suites = Element("testsuites", name=_text(f"gemexport: {report.model.name}"), time=f"{report.seconds:.3f}")
    for artifact in report.artifacts:
        _suite(suites, artifact, report.allow_partial)
    _count(suites)
    indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(suites, encoding="unicode") + "\n"


def _suite(parent: Element, artifact: ArtifactReport, allow_partial: bool) -> None:
    suite = SubElement(
        parent, "testsuite", name=_text(f"{artifact.format} {artifact.variant}"), time=f"{artifact.seconds:.3f}"
    )
    seen: Counter[str] = Counter()
    for bound in artifact.bounds:
        seen[bound.metric] += 1
        # A name that comes twice would be one test to most readers.
        again = f" ({seen[bound.metric]})" if seen[bound.metric] > 1 else ""
        case = _case(suite, artifact, bound.metric + again)
        if not bound.held:
            _result(case, "failure", str(bound))
    left_out = "skipped" if allow_partial else "failure"
    kinds = {"left out": left_out, "crashed": "error", "refused": None}  # which is a bound
    for item in artifact.unjudged:
        if (kind := kinds[item.because]) is not None:
            _result(_case(suite, artifact, f"{item.part} judged"), kind, item.reason)
    told = artifact.unjudged or any(not bound.held for bound in artifact.bounds)
    if artifact.status in _KINDS and not told:
        _result(_case(suite, artifact, "verdict"), _KINDS[artifact.status], artifact.reason or artifact.status)
    elif not artifact.bounds and not told:
        _case(suite, artifact, "verdict")
    _count(suite)


def _case(suite: Element, artifact: ArtifactReport, name: str) -> Element:
    # Readers make a tree of a class name at its dots.
    variant = artifact.variant.replace(".", "_")
    return SubElement(suite, "testcase", classname=_text(f"gemexport.{artifact.format}.{variant}"), name=_text(name))


def _result(case: Element, kind: str, reason: str) -> None:
    result = SubElement(case, kind, message=_text(reason))
    if kind != "skipped":
        result.set("type", "bound" if kind == "failure" else "error")
        result.text = _text(reason)


def _count(element: Element) -> None:
    """Set the attributes that count the cases within."""
    element.set("tests", str(len(list(element.iter("testcase")))))
    for attribute, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        element.set(attribute, str(len(list(element.iter(kind)))))


def _text(text: str) -> str:
    return _UNWRITABLE.sub("\ufffd", text)
