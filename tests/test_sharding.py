"""`--shard 3/8` and `gaugeblock merge`: every verdict exactly once, and the report of the whole."""

import json

import pytest
from kept_runs import begin, kernel

from gaugeblock.conformance import cli, exit_status
from gaugeblock.conformance.engine.devices import set_up_process
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import builtin_implementations, contracts
from gaugeblock.conformance.engine.sharding import Shard, cut, expected_seconds, shard
from gaugeblock.conformance.engine.trial import Subject

PROPERTIES = ("parity", "determinism", "rejections")


# ----------------------------------------------------------------------------------------------------------- the parts


@pytest.fixture(scope="module")
def work():
    """Everything that is built in."""
    set_up_process()
    every = [each for contract in contracts().values() for each in builtin_implementations(contract)]
    subjects = [Subject(each, dtype, "cpu") for each in every for dtype in each.dtypes]
    return [(subject, prop) for prop in properties().values() for subject in subjects]


@pytest.fixture(scope="module")
def seconds(work):
    return [0.0 if prop.inapplicable(subject) else expected_seconds(subject, prop) for subject, prop in work]


@pytest.mark.parametrize("of", [1, 2, 3, 8, 50])
def test_every_verdict_is_in_exactly_one_shard(work, seconds, of):
    shards = [cut(work, seconds, Shard(number, of)) for number in range(1, of + 1)]
    assert sorted(position for each in shards for position in each) == [*range(len(work))]
    assert shards == [cut(work, seconds, Shard(number, of)) for number in range(1, of + 1)]


@pytest.mark.parametrize("of", [2, 3, 8])
def test_shards_take_about_as_long_as_each_other(work, seconds, of):
    lengths = [sum(seconds[each] for each in cut(work, seconds, Shard(number, of))) for number in range(1, of + 1)]
    assert max(lengths) - min(lengths) <= 2 * max(seconds) and min(lengths) > 0


def test_shards_of_almost_nothing_are_empty(work, seconds):
    assert sorted(len(cut(work[:2], seconds[:2], Shard(number, 5))) for number in range(1, 6)) == [0, 0, 0, 1, 1]
    assert cut([], [], Shard(1, 2)) == []


def test_a_shard_is_written_as_a_fraction():
    assert shard("3/8") == Shard(3, 8) and str(Shard(3, 8)) == "3/8"


@pytest.mark.parametrize("text", ["", "3", "0/8", "9/8", "1/0", "-1/8", "a/b", "1/2/3"])
def test_what_is_no_shard_exits_2(text, capsys, runs):
    assert cli.main(["check", str(runs.folder), f"--shard={text}"]) == exit_status.WRONG_CALL
    assert repr(text) in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ the whole


@pytest.fixture
def runs(monkeypatch, tmp_path):
    found = begin(monkeypatch, tmp_path)
    found.write(right=kernel("right"), wrong=kernel("wrong", more=" * 2"), third=kernel("third"))
    monkeypatch.setenv("GAUGEBLOCK_KEPT", "off")
    return found


def read(folder):
    report = json.loads((folder / "gaugeblock.json").read_text())
    return report, [{**each, "seconds": 0.0} for each in report["verdicts"]]


def merge(folder, *names):
    return cli.main(["merge", *(str(folder / name) for name in names), "--report", str(folder / "merged")])


def test_merged_shards_are_the_whole(runs, tmp_path):
    whole = runs.check(properties=PROPERTIES)
    assert whole == exit_status.FAILS
    statuses = {runs.check("--shard", f"{number}/3", report=f"shard{number}", properties=PROPERTIES) for number in (1, 2, 3)}
    assert statuses == {exit_status.CONFORM, exit_status.FAILS}
    assert merge(tmp_path, "shard2", "shard3", "shard1") == whole
    (report, merged), (_, expected) = read(tmp_path / "merged"), read(tmp_path / "report")
    assert merged == expected and report["environment"]["part"] == {"merged": 3, "missing": []}
    for name in ("junit.xml", "index.html", "summary.md", "badge.json"):
        assert (tmp_path / "merged" / name).is_file()
    (failure,) = (tmp_path / "merged" / "failures").glob("*.json")
    assert json.loads(failure.read_text()) == json.loads((tmp_path / "report" / "failures" / failure.name).read_text())


@pytest.fixture
def shards(runs, tmp_path, capsys):
    """Reports of two shards that pass, made quickly."""
    for number in (1, 2):
        runs.check("--shard", f"{number}/2", "--implementation", "right", report=f"shard{number}")
    capsys.readouterr()
    return tmp_path


def change(folder, alter):
    path = folder / "gaugeblock.json"
    report = json.loads(path.read_text())
    alter(report)
    path.write_text(json.dumps(report))


def test_missing_shards_are_named_and_are_no_success(shards, capsys):
    assert merge(shards, "shard1", "shard2") == exit_status.CONFORM
    assert merge(shards, "shard2") == exit_status.WRONG_CALL
    assert "missing: shard 1 of 2" in capsys.readouterr().out
    assert read(shards / "merged")[0]["environment"]["part"]["missing"] == [1]


def test_a_verdict_in_two_reports_is_an_error(shards, capsys):
    assert merge(shards, "shard1", "shard2", "shard1") == exit_status.WRONG_CALL
    error = capsys.readouterr().err
    assert "both have a verdict on objectives.rectified_flow_velocity/right/" in error and error.count("\n") == 1


def of_another_commit(report):
    report["environment"]["git"] = {"commit": "0123", "dirty": False}


ALTERED = {
    "profile": lambda report: report.update(profile="ci"),
    "commit": of_another_commit,
    "gaugeblock": lambda report: report.update(gaugeblock="0.0"),
    "number of shards": lambda report: report["environment"]["part"]["shard"].update(of=3),
    "number of verdicts": lambda report: report["environment"]["part"]["shard"].update(total=9),
    "verdicts": lambda report: report["verdicts"].pop(),
    "add up": lambda report: report["environment"]["part"]["shard"].update(positions=[9] * len(report["verdicts"])),
}


@pytest.mark.parametrize("what", ALTERED)
def test_what_does_not_belong_together_is_not_merged(shards, capsys, what):
    change(shards / "shard2", ALTERED[what])
    assert merge(shards, "shard1", "shard2") == exit_status.WRONG_CALL
    assert what in capsys.readouterr().err and not (shards / "merged").exists()


def test_reports_of_different_candidates_can_be_merged_too(runs, tmp_path):
    runs.check("--implementation", "right", report="one")
    runs.check("--implementation", "third", report="other")
    assert merge(tmp_path, "one", "other") == exit_status.CONFORM
    assert {each["implementation"] for each in read(tmp_path / "merged")[1]} == {"right", "third"}


def test_a_shard_with_nothing_to_test_is_no_mistake_but_a_whole_is(runs, tmp_path, capsys):
    for number in (1, 2):
        runs.check("--shard", f"{number}/2", "--implementation", "right", report=f"shard{number}", properties=("rejections",))
    assert merge(tmp_path, "shard1", "shard2") == exit_status.NOTHING_TESTED


def test_machines_that_differ_are_all_named(shards):
    change(shards / "shard2", lambda report: report["environment"].update(cpu="another"))
    merge(shards, "shard1", "shard2")
    assert read(shards / "merged")[0]["environment"]["cpu"].endswith("; another")
