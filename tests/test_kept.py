"""Kept verdicts: what is judged again and what is not, and what is not believed."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from kept_runs import VELOCITY, begin, kernel

from gaugeblock.conformance import exit_status, gate
from gaugeblock.conformance.engine import exploration
from gaugeblock.conformance.engine.judging.verdict import Statistics, Verdict
from gaugeblock.conformance.engine.kept.store import Store, default_folder

DIGEST = "ab" * 32
JUDGED = {"date": "2026-11-20T10:00:00+00:00", "commit": "0123456789abcdef with uncommitted changes"}
BOTH = {("near", "parity"), ("near", "determinism")}
OTHER = {("far", "parity"), ("far", "determinism")}


@pytest.fixture
def runs(monkeypatch, tmp_path):
    found = begin(monkeypatch, tmp_path)
    helper = "from second import SIGN\n\ndef signed(value):\n    return SIGN * value\n"
    found.write(near=kernel("near", "import first"), far=kernel("far"), first=helper, second="SIGN = 1\n")
    return found


# --------------------------------------------------------------------------------------------------------- whole runs


def test_a_changed_helper_two_imports_away_is_judged_again_and_nothing_else(runs):
    assert runs.check() == exit_status.CONFORM
    assert runs.judged == BOTH | OTHER and not runs.kept
    assert runs.check() == exit_status.CONFORM
    assert not runs.judged and runs.kept == BOTH | OTHER
    runs.write(second="SIGN = 2 - 1\n")
    assert runs.check() == exit_status.CONFORM
    assert (runs.judged, runs.kept) == (BOTH, OTHER)


def test_a_kept_verdict_is_the_same_and_is_marked_in_every_report(runs, capsys):
    runs.check()
    before = {**runs.verdicts}
    capsys.readouterr()
    runs.check("--implementation", "near")
    verdict = runs.verdicts["near", "parity"]
    assert verdict | {"kept": None} == before["near", "parity"]
    when, commit = (verdict["kept"][name] for name in ("date", "commit"))
    assert when.startswith("20") and commit.partition(" ")[0] == (runs.report["environment"]["git"] or {}).get("commit", "")
    report = runs.folder.parent / "report"
    (case, *_) = ElementTree.parse(report / "junit.xml").iter("testcase")
    assert {each.get("name"): each.get("value") for each in case.iter("property")} == {"kept.date": when, "kept.commit": commit}
    assert case.get("time") == "0.000"
    shown = capsys.readouterr().out
    assert "✓°" in shown and f"all kept of {when[:10]}" in shown and "0 cases judged" in shown
    summary = (report / "summary.md").read_text()
    assert f"all kept of {when[:10]}" in summary and "&#9989;&#176; 0.55" in summary


def test_fresh_judges_everything_and_keeps_it(runs):
    runs.check()
    runs.check("--fresh", "--implementation", "near")
    assert runs.judged == BOTH
    runs.check()
    assert not runs.judged


def test_nothing_is_kept_where_that_is_said(runs, tmp_path):
    runs.check("--kept", "off")
    assert not (tmp_path / "kept").exists()
    runs.check("--kept", str(tmp_path / "elsewhere"), "--implementation", "near")
    assert runs.judged == BOTH and (tmp_path / "elsewhere").is_dir() and not (tmp_path / "kept").exists()


def test_a_failure_is_judged_again(runs):
    runs.write(near=kernel("near", more=" * 2"))
    assert runs.check() == exit_status.FAILS
    assert runs.check() == exit_status.FAILS
    assert runs.judged == {("near", "parity")} and runs.kept == OTHER | {("near", "determinism")}


def test_a_pass_is_taken_away_when_what_it_was_given_to_fails(runs, monkeypatch):
    runs.write(near=kernel("near", "import os", " * float(os.environ.get('SCA' + 'LE', 1))"))  # a name that is not seen
    assert runs.check("--implementation", "near") == exit_status.CONFORM
    monkeypatch.setenv("SCALE", "2")
    assert runs.check("--implementation", "near", "--fresh") == exit_status.FAILS
    monkeypatch.delenv("SCALE")
    assert runs.check("--implementation", "near") == exit_status.CONFORM
    assert runs.judged == {("near", "parity")}


def test_a_variable_that_a_kernel_names_is_part_of_what_it_depends_on(runs, monkeypatch):
    runs.write(near=kernel("near", "import os", " * float(os.environ.get('FACTOR', 1))"))
    assert runs.check() == exit_status.CONFORM
    monkeypatch.setenv("FACTOR", "2")
    assert runs.check() == exit_status.FAILS
    assert runs.judged == BOTH


def test_what_is_drawn_anew_each_time_is_never_kept(runs, monkeypatch):
    brief = replace(exploration.PROFILES["quick"], name="thorough", derandomize=False)
    monkeypatch.setitem(exploration.PROFILES, "thorough", brief)
    for _ in range(2):
        runs.check("--profile", "thorough", "--implementation", "near")
        assert runs.judged == BOTH


def test_what_changes_while_it_is_judged_is_not_kept(runs, monkeypatch):
    judged = runs.run_tasks

    def and_edited(*arguments, **limits):
        for task, verdict in judged(*arguments, **limits):
            runs.write(second="SIGN = 3 - 2\n")
            yield task, verdict

    monkeypatch.setattr(gate, "run_tasks", and_edited)
    runs.check()
    runs.write(second="SIGN = 1\n")
    runs.check()
    assert runs.judged == BOTH and runs.kept == OTHER


def test_runs_in_processes_of_their_own_keep_too(tmp_path):
    (tmp_path / "mine.py").write_text(kernel("mine"))
    command = [sys.executable, "-m", "gaugeblock.conformance.cli", "check", "mine.py", "--property", "parity", "--kept", "kept"]
    shown = [subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=170) for _ in range(2)]
    assert [each.returncode for each in shown] == [exit_status.CONFORM] * 2
    assert [("0 cases judged" in each.stdout, "✓°" in each.stdout) for each in shown] == [(False, False), (True, True)]


FORGES = """
import os
from pathlib import Path
from gaugeblock.conformance.engine.exploration import PROFILES
from gaugeblock.conformance.engine.kept.digest import Digests
from gaugeblock.conformance.engine.kept.store import Store
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import Candidate, Implementation
from gaugeblock.conformance.engine.trial import Subject
from gaugeblock.conformance.engine.judging.verdict import Verdict

claims = dict(differentiable=False, validates=False)
mine = Implementation("{contract}", "near", Candidate(os.path.realpath(__file__)), **claims)
digest = Digests().of(Subject(mine, "float32", "cpu"), properties()["parity"], PROFILES["quick"])
whose = dict(contract="{contract}", implementation="near", kind="user", dtype="float32", device="cpu")
forged = Verdict(**whose, property="parity", status="pass", cases=1)
Store(Path(os.environ["GAUGEBLOCK_KEPT"])).save(digest, forged, {{"date": "2026-11-20", "commit": ""}})
"""


def test_a_candidate_cannot_write_its_own_verdict(runs, tmp_path):
    runs.write(near=kernel("near", FORGES.format(contract=VELOCITY), " * 2"))
    for _ in range(2):
        assert runs.check("--implementation", "near") == exit_status.FAILS
        assert ("near", "parity") in runs.judged and runs.verdicts["near", "parity"]["status"] == "fail"
        kept = [json.loads(each.read_text())["verdict"]["property"] for each in (tmp_path / "kept").rglob("*.json")]
        assert kept == ["determinism"]


# ----------------------------------------------------------------------------------------------------------- the folder


def verdict(**fields) -> Verdict:
    statistics = {"velocity": Statistics(0.5, 0.4, 0.3, 100)}
    known = {"status": "pass", "cases": 3, "statistics": statistics, "fingerprints": {"Case()": "0a1b"}} | fields
    whose = {"contract": VELOCITY, "implementation": "mine", "kind": "user", "dtype": "float32", "device": "cpu"}
    return Verdict(**whose, property="parity", **known)


@pytest.fixture
def folder(tmp_path):
    Store(tmp_path / "kept").save(DIGEST, verdict(), JUDGED)
    return tmp_path / "kept"


def only_file(folder: Path) -> Path:
    (found,) = folder.rglob("*.json")
    return found


def test_what_was_saved_is_loaded_with_its_date_and_commit(folder):
    assert Store(folder).load(DIGEST) == verdict(kept=JUDGED)
    assert Store(folder).load("cd" * 32) is None


def edited(text: str, **changes) -> str:
    entry = json.loads(text)
    entry["verdict"] |= changes
    return json.dumps(entry)


DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "not JSON": lambda text: "\0" * 100,
    "another thing": lambda text: "[1, 2]",
    "another format": lambda text: text.replace('"format": 1', '"format": 0'),
    "a digit": lambda text: text.replace("0.5", "0.1"),
    "the status": lambda text: edited(text, status="warning"),
    "a field more": lambda text: edited(text, colour="red"),
    "fields of other types": lambda text: edited(text, statistics=[1, 2]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_ignored(folder, damage):
    path = only_file(folder)
    assert damage(path.read_text()) != path.read_text()
    path.write_text(damage(path.read_text()))
    assert Store(folder).load(DIGEST) is None


def test_an_entry_under_another_name_is_ignored(folder):
    other = "abcd" + DIGEST[4:]
    only_file(folder).rename(only_file(folder).with_name(f"{other}.json"))
    assert Store(folder).load(other) is None


def test_an_entry_that_cannot_be_read_is_ignored(folder):
    path = only_file(folder)
    path.unlink()
    path.mkdir()
    assert Store(folder).load(DIGEST) is None


def test_what_comes_or_changes_during_a_run_is_neither_believed_nor_left(folder):
    store = Store(folder)
    planted, changed, own = "cd" * 32, DIGEST, "ef" * 32
    foreign = Store(folder)
    foreign.save(planted, verdict(), JUDGED)
    foreign.save(changed, verdict(cases=4), JUDGED)
    store.save(own, verdict(), JUDGED)
    assert store.load(planted) is None and store.load(changed) is None
    store.remove_foreign()
    assert [each.stem for each in folder.rglob("*.json")] == [own]


def test_what_was_of_no_use_for_long_is_removed_and_what_is_too_much_the_oldest_first(folder):
    store, digests = Store(folder), [f"{number:064x}" for number in range(1, 5)]
    for age, digest in enumerate(digests):
        store.save(digest, verdict(), JUDGED)
        when = time.time() - 86400 * age
        os.utime(folder / "00" / f"{digest}.json", (when, when))
    store.prune(most_days=2.5)
    assert {each.stem for each in folder.rglob("*.json")} == {DIGEST, *digests[:3]}
    size = only_file(folder / DIGEST[:2]).stat().st_size
    store.prune(most_bytes=int(2.5 * size))
    assert {each.stem for each in folder.rglob("*.json")} == {DIGEST, digests[0]}


def test_use_makes_an_entry_young_again(folder):
    os.utime(only_file(folder), (0, 0))
    assert Store(folder).load(DIGEST) is not None
    Store(folder).prune(most_days=1)
    assert only_file(folder)


def test_the_folder_is_that_of_the_variable_or_a_cache_of_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("GAUGEBLOCK_KEPT", str(tmp_path / "here"))
    assert default_folder() == tmp_path / "here"
    monkeypatch.setenv("GAUGEBLOCK_KEPT", "off")
    assert default_folder() is None
    monkeypatch.delenv("GAUGEBLOCK_KEPT")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_folder() == tmp_path / "cache" / "gaugeblock" / "verdicts"


def test_a_folder_that_cannot_be_made_is_the_callers_mistake(runs, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError):  # there is no report
        runs.check("--kept", str(tmp_path / "file" / "kept"))
    assert capsys.readouterr().err.startswith(f"gaugeblock: --kept {tmp_path}/file/kept: ")
