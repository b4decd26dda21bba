"""The report's folder: JSON, JUnit XML, Markdown, a badge, a page, and each failure as a script and as JSON."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

import gaugeblock
from gaugeblock.conformance.engine.judging.verdict import FAILED, Verdict
from gaugeblock.conformance.report import markdown, page, view
from gaugeblock.conformance.report.failure_text import explanation
from gaugeblock.conformance.report.view import printable

FORMAT = 1  # of gaugeblock.json and of failures/*.json
BUILT_IN: Mapping[tuple[str, str], str | None] = MappingProxyType({})


def write_report(
    folder: Path,
    verdicts: Sequence[Verdict],
    environment: dict[str, Any],
    profile: str,
    sources: Mapping[tuple[str, str], str | None] = BUILT_IN,
) -> None:
    """Writes the whole report; in GitHub Actions also the job's summary, and error annotations to the standard output.

    Args:
        folder: Made if need be; what an earlier run left in its `failures/` is removed.
        verdicts: In the order in which contracts and properties should appear.
        environment: From `capture_environment`.
        profile: How long the gate was allowed to take: `"quick"`, `"ci"` or `"thorough"`.
        sources: The file or module that registered each (contract, implementation); built-in ones have none.

    Raises:
        ValueError: If the folder cannot be written to.
    """
    run = {
        "format": FORMAT,
        "gaugeblock": gaugeblock.__version__,
        "profile": profile,
        "environment": environment,
        "verdicts": [each.to_json() for each in verdicts],
    }
    summary = markdown.summary(verdicts, environment, profile)
    make_folder(folder)
    try:
        _write(folder / "gaugeblock.json", json_text(run))
        _write(folder / "junit.xml", junit(verdicts))
        _write(folder / "summary.md", summary)
        _write(folder / "badge.json", json_text(markdown.badge(verdicts)))
        _write(folder / "index.html", page.render(verdicts, environment, profile))
        _write_failures(folder / "failures", verdicts, sources)
        if "GITHUB_STEP_SUMMARY" in os.environ:
            with open(os.environ["GITHUB_STEP_SUMMARY"], "a", encoding="utf-8") as file:
                file.write(summary)
    except OSError as error:
        raise ValueError(f"{error.filename or folder}: {error.strerror}") from None
    if "GITHUB_ACTIONS" in os.environ:
        print(*markdown.annotations(verdicts), sep="\n")


def make_folder(folder: Path) -> None:
    """Makes the report's folder, before the run whose report would be lost otherwise.

    Raises:
        ValueError: If that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}") from None


def json_text(data: Any) -> str:
    """Standard JSON. Infinity, which an error can be, becomes 1e999: every reader takes that for infinity, or says so."""
    chunks = json.JSONEncoder(indent=1).iterencode(data)
    return "".join("1e999" if chunk == "Infinity" else chunk for chunk in chunks) + "\n"


def junit(verdicts: Sequence[Verdict]) -> str:
    """JUnit XML: a suite for each contract, a test case for each verdict."""
    root = ElementTree.Element("testsuites", name="gaugeblock")
    for contract in dict.fromkeys(each.contract for each in verdicts):
        rows = [each for each in verdicts if each.contract == contract]
        counts = {
            "tests": len(rows),
            "failures": sum(each.status == "fail" for each in rows),
            "errors": sum(each.status in ("crash", "timeout", "error") for each in rows),
            "skipped": sum(each.status in ("not supported", "waived") for each in rows),
        }
        seconds = f"{sum(map(_seconds, rows)):.3f}"
        attributes = {"name": printable(contract), "time": seconds, **{name: str(number) for name, number in counts.items()}}
        suite = ElementTree.SubElement(root, "testsuite", attributes)
        for each in rows:
            _testcase(suite, each)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _seconds(verdict: Verdict) -> float:
    """What it took in this run."""
    return 0.0 if verdict.kept else verdict.seconds


def _testcase(suite: ElementTree.Element, verdict: Verdict) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname=printable(f"{verdict.contract}.{verdict.implementation}"),
        name=printable(f"{verdict.property}[{verdict.dtype}-{verdict.device}]"),
        time=f"{_seconds(verdict):.3f}",
    )
    if verdict.kept:
        found = ElementTree.SubElement(case, "properties")
        for name, value in verdict.kept.items():
            ElementTree.SubElement(found, "property", name=f"kept.{name}", value=printable(value))
    reason = printable(verdict.reason)
    if verdict.status in FAILED:
        tag = "failure" if verdict.status == "fail" else "error"
        result = ElementTree.SubElement(case, tag, message=reason, type=verdict.status)
        script = verdict.failure.script if verdict.failure else ""
        result.text = "\n".join([*explanation(verdict), *(["", printable(script)] if script else [])])
    elif verdict.status in ("not supported", "waived"):
        ElementTree.SubElement(case, "skipped", message=f"{verdict.status}: {reason}")
    elif remark := printable(view.remark(verdict)):
        ElementTree.SubElement(case, "system-out").text = f"{verdict.status}: {remark}"


def _write_failures(folder: Path, verdicts: Sequence[Verdict], sources: Mapping[tuple[str, str], str | None]) -> None:
    folder.mkdir(exist_ok=True)
    ours = "*__*__*__*__*"  # slugs: whatever else a user keeps in a folder of this name stays
    for stale in (*folder.glob(f"{ours}.py"), *folder.glob(f"{ours}.json")):
        stale.unlink()
    for each in verdicts:
        if each.failure is None:
            continue
        name = view.slug(each)
        failure = {
            "format": FORMAT,
            "contract": each.contract,
            "implementation": each.implementation,
            "property": each.property,
            "dtype": each.dtype,
            "device": each.device,
            "source": sources.get((each.contract, each.implementation)),
            "cases": each.failure.cases,
        }
        _write(folder / f"{name}.json", json_text(failure))
        _write(folder / f"{name}.py", printable(each.failure.script))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
