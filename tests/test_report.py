"""What a run leaves behind: the same verdicts in every file, and nothing that a candidate could inject."""

import datetime
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from gaugeblock.conformance.engine.judging.verdict import Coverage, Failure, Statistics, Verdict
from gaugeblock.conformance.report import catalogue, compare, files, terminal, waivers
from gaugeblock.conformance.report.environment import capture_environment

ROOT = Path(__file__).parents[1]
NASTY = "<script>alert(\"1\")</script> & 'quotes'\nsecond line"
CASE = {"num_tokens": 3, "top_k": 1, "regime": "dithered", "layout": "contiguous", "seed": 0}


def verdict(name: str = "parity", status: str = "pass", **changes: object) -> Verdict:
    statistics = {"topk_weights": Statistics(0.31, 0.4, None, 1200)}
    whose = {"contract": "routers.softmax_topk", "implementation": "mychip", "kind": "user", "dtype": "float16", "device": "cpu"}
    found = {"property": name, "status": status, "cases": 8, "seconds": 0.5, "statistics": statistics}
    return Verdict(**{**whose, **found, **changes})


FAILING = verdict(
    "layout", "fail", reason=NASTY, statistics={"out": Statistics(float("inf"), 2.0, 0.1, 99)},
    failure=Failure(NASTY, "rows 16-31", ("a detail",), (CASE,), "print('again')"),
)  # fmt: skip
VERDICTS = [verdict(fingerprints={"Case(...)": "abc"}), FAILING, verdict("program_order", "not supported", reason="why", cases=0)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files.write_report(tmp_path, VERDICTS, capture_environment(), "quick", {("routers.softmax_topk", "mychip"): "/k.py"})
    return tmp_path


def test_json_round_trip(folder):
    run = json.loads((folder / "gaugeblock.json").read_text())
    assert [Verdict.from_json(each) for each in run["verdicts"]] == VERDICTS


def test_junit_counts(folder):
    suite = ElementTree.parse(folder / "junit.xml").getroot().find("testsuite")
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3", "failures": "1", "errors": "0", "skipped": "1",
    }  # fmt: skip


def test_page_is_self_contained_and_escaped(folder):
    page = (folder / "index.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page) and "@import" not in page


def test_failure_files_say_how_to_run_again(folder):
    (path,) = (folder / "failures").glob("*.json")
    failure = json.loads(path.read_text())
    assert failure["cases"] == [CASE] and failure["source"] == "/k.py" and failure["property"] == "layout"
    assert path.with_suffix(".py").read_text() == "print('again')"


def test_matrix_fits_a_narrow_terminal(capsys):
    terminal.print_matrix(VERDICTS, Console(width=80), 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("layout") and "✗" in line for line in lines)


def test_waiver_hides_a_failure_until_its_date(tmp_path):
    path = tmp_path / "waivers.toml"
    path.write_text('[[waiver]]\nid = "*/layout/*"\nlink = "https://example.org/1"\nexpires = 2026-12-31\n')
    loaded = waivers.load_waivers(path)
    before, _ = loaded.apply(VERDICTS, datetime.date(2026, 12, 31))
    after, _ = loaded.apply(VERDICTS, datetime.date(2027, 1, 1))
    assert [each.status for each in before] == ["pass", "waived", "not supported"]
    assert after[1].status == "fail" and "expired" in after[1].reason


@pytest.mark.parametrize("line", ["", 'link = "https://example.org"', 'expires = "soon"', "extra = 1"])
def test_bad_waivers_name_file_and_key(tmp_path, line):
    path = tmp_path / "waivers.toml"
    path.write_text(f'[[waiver]]\nid = "*"\n{line}\n')
    with pytest.raises(ValueError, match=r"waivers\.toml"):
        waivers.load_waivers(path)


def test_compare_finds_new_failures_and_changed_bits(folder, tmp_path):
    before = compare.load_run(folder / "gaugeblock.json")
    run = json.loads((folder / "gaugeblock.json").read_text())
    run["verdicts"][0] |= {"status": "fail", "reason": "worse", "fingerprints": {"Case(...)": "xyz"}}
    (tmp_path / "after.json").write_text(json.dumps(run))
    after = compare.load_run(tmp_path / "after.json")
    assert compare.compare(before, before).exit_status == 0
    assert compare.compare(before, after).exit_status == 1


def test_the_readme_lists_what_exists():
    assert catalogue.readme_is_current(ROOT / "README.md"), "run: gaugeblock list --markdown, and put it between the markers"


def test_what_was_visited_is_in_the_page_and_in_the_summary(tmp_path):
    covered = [
        verdict(coverage=Coverage(58, 166, "pairs", sparing=True)),
        verdict(implementation="another", coverage=Coverage(166, 166, "pairs")),
        verdict("layout", "warning", reason="visits only 3 of 9 classes: the time was up", coverage=Coverage(3, 9, "classes")),
    ]
    files.write_report(tmp_path, covered, capture_environment(), "quick")
    page, summary = (tmp_path / "index.html").read_text(), (tmp_path / "summary.md").read_text()
    assert "58 of 166 pairs*" in page and "166 of 166 pairs<" in page
    assert "58 of 166 pairs&#42;" in summary and "166 of 166 pairs" not in summary  # that of which it visited least
    run = json.loads((tmp_path / "gaugeblock.json").read_text())
    assert [Verdict.from_json(each) for each in run["verdicts"]] == covered
    console = Console(record=True, width=120)
    terminal.print_matrix(covered, console)
    assert "visits only 3 of 9 classes" in (text := console.export_text()) and "166" not in text
