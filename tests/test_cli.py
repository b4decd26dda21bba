"""The command: what subcommands print, how they exit, and that help imports nothing heavy."""

import json
import subprocess
import sys

import pytest

from gaugeblock.conformance import cli, exit_status
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import contracts

ROUTER, GROUPED, EXPERTS = "routers.softmax_topk", "routers.grouped_sigmoid_topk", "experts.fused_swiglu"
HEAVY = {"torch", "jax", "triton", "numpy", "hypothesis", "rich", "gaugeblock.conformance.engine.trial"}


@pytest.fixture
def output_of(capsys, monkeypatch):
    """Runs a command that succeeds, and returns what it printed."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == exit_status.CONFORM
        return capsys.readouterr().out

    return run


def imported_by(program: str) -> set[str]:
    """Heavy packages that a program imports in a process of its own."""
    program += f"\nimport sys; print('imported', *({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {*done.stdout.splitlines()[-1].split()[1:]}


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    assert imported_by(
        "from gaugeblock.conformance.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as end: assert end.code == 0"
    ) == set()  # fmt: skip


def test_the_plugin_imports_nothing_heavy_into_other_peoples_pytest():
    assert imported_by("import gaugeblock.conformance.plugin") == set()


def test_list_json_has_an_object_for_each_contract(output_of):
    rows = json.loads(output_of("list", "--json"))
    assert [row["contract"] for row in rows] == [*contracts()]
    for row in rows:
        assert [*row] == ["contract", "references", "implementations", "properties", "workloads"]
        assert row["references"] == ["torch", "jax"]
        if row["contract"] in ("routers.softmax_topk", "experts.fused_swiglu"):
            assert {"name": "triton", "framework": "torch", "kind": "triton"} in row["implementations"]
        first = ["parity", "gradients"] if contracts()[row["contract"]].gradients else ["parity"]
        assert {*row["properties"]} <= {*properties()} and row["properties"][: len(first)] == first
        assert row["workloads"] == [each.name for each in contracts()[row["contract"]].workloads]


def test_list_shows_contracts_and_who_fulfils_them(output_of):
    lines = {line.split()[0]: line for line in output_of("list").splitlines() if line.strip()}
    assert {ROUTER, GROUPED, EXPERTS} <= {*lines}
    assert "torch, jax" in lines[EXPERTS] and "triton" in lines[EXPERTS] and "jax-grouped" in lines[EXPERTS]


def test_list_markdown_is_a_table(output_of):
    header, rule, *rows = output_of("list", "--markdown").splitlines()
    assert header.startswith("| contract") and set(rule) <= set("|-: ") and len(rows) == len(contracts())


@pytest.mark.parametrize("name", [ROUTER, GROUPED, EXPERTS])
def test_explain_says_all_that_a_contract_demands(output_of, name):
    text, contract = output_of("explain", name), contracts()[name]
    assert contract.signature in text and contract.source.split(";")[0] in text
    named = (
        *contract.inputs,
        *contract.outputs,
        *contract.regimes,
        *contract.rejections,
        *contract.workloads,
    )
    assert [each.name for each in named if each.name not in text] == []
    assert [prop for prop in properties() if prop not in contract.without and prop not in text] == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["explain", "routers.softmax"], f"did you mean {ROUTER!r}?"),
        (["check", "missing.py"], "missing.py: no such file"),
        (["check", "a_module_that_is_missing"], "No module named 'a_module_that_is_missing'"),
        (["reproduce", "missing.json"], "missing.json"),
        (["compare", "missing.json", "missing.json"], "missing.json"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_what_does_not_exist_is_told_in_one_line_and_exits_2(arguments, reason, capsys):
    assert cli.main(arguments) == exit_status.WRONG_CALL
    output = capsys.readouterr()
    assert output.err.startswith("gaugeblock: ") and output.err.count("\n") == 1 and reason in output.err


@pytest.mark.parametrize("arguments", [[], ["chek"], ["check", "--profile", "slow"], ["explain"]], ids=str)
def test_a_wrong_call_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == exit_status.WRONG_CALL
    assert capsys.readouterr().err.startswith("usage: gaugeblock")


def test_every_command_is_explained_by_help(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    names = [command.__name__.rpartition(".")[2] for command in cli.COMMANDS]
    assert [name for name in names if f"    {name}" not in text] == []
