"""Public libraries on trial: the table in step with the adapters, and what a run of theirs ends with."""

import ast
import re
from dataclasses import replace

import pytest
import torch

from gaugeblock.conformance import cli, exit_status
from gaugeblock.conformance.engine.judging.verdict import Verdict
from gaugeblock.conformance.peers import peer, trial
from gaugeblock.conformance.peers.modules import without_projection
from gaugeblock.conformance.peers.peer import LIBRARIES, peers
from gaugeblock.conformance.selftest.fault import name_of

FOLDER = trial.VERDICTS.parent
ROWS = trial.rows_of(trial.VERDICTS.read_text())
PASSED = Verdict(
    contract="experts.fused_swiglu", implementation="transformers-eager-experts", kind="user", property="parity", dtype="float32",
    device="cpu", status="pass", cases=3,
)  # fmt: skip
FAILED = replace(PASSED, property="layout", status="fail", reason="strided rows")


def adapters() -> dict[str, str]:
    """The library of every adapter, by the peer's name, also where the library is not installed."""
    found = {}
    for module, library in LIBRARIES.items():
        for node in ast.parse((FOLDER / f"{module}.py").read_text()).body:
            if isinstance(node, ast.ClassDef) and any("peer(" in ast.unparse(each) for each in node.decorator_list):
                found[name_of(type(node.name, (), {}))] = library
    return found


def cells(name: str) -> list[str]:
    return ROWS[name].strip("| ").split(" | ")


def test_the_table_has_every_adapter_and_no_other():
    assert adapters() and ROWS.keys() == adapters().keys()
    assert trial.findings().keys() <= ROWS.keys()
    assert {each.name: each.library for each in peers()}.items() <= adapters().items()


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_names_a_version_and_a_day_and_says_why_it_fails(name):
    _, library, _, _, outcome, why, day = cells(name)
    assert re.fullmatch(rf"{adapters()[name]} \d+\.\d+(\.\w+)*", library)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", day)
    assert why.strip() == trial.findings().get(name, "")
    assert why.strip() or "fail" not in outcome, "what fails is understood"


def test_a_row_names_the_contract_that_its_adapter_fulfils():
    assert peers()
    for each in peers():
        assert cells(each.name)[2].strip("`") == each.contract


def test_a_failing_peer_is_no_failure_of_ours_but_an_error_of_the_engine_is():
    assert trial.status_of([PASSED, FAILED]) == trial.status_of([FAILED]) == exit_status.CONFORM
    assert trial.status_of([replace(PASSED, status="error")]) == exit_status.WRONG_CALL
    assert trial.status_of([]) == exit_status.NOTHING_TESTED


def test_rows_of_what_was_judged_are_written_and_others_stay(tmp_path):
    path = tmp_path / "table.md"
    other = ROWS["transformers-qwen3-router"]
    path.write_text(f"before\n<!-- peers:begin -->\n{other}\n| `transformers-gone` | x | y |\n<!-- peers:end -->\nafter\n")
    trial.update(path, [PASSED, FAILED, replace(PASSED, dtype="float16")], "2026-01-02")
    text = path.read_text()
    written = trial.rows_of(text)
    assert written.keys() == {"transformers-qwen3-router", "transformers-eager-experts"}
    assert written["transformers-qwen3-router"] == other and text.startswith("before") and text.endswith("after\n")
    assert "| fp32: 1 of 2 fail: layout; fp16: all 1 conform |" in written["transformers-eager-experts"]
    assert "2026-01-02" in written["transformers-eager-experts"]


def test_a_library_that_is_not_installed_is_skipped_and_named(monkeypatch):
    absent = "diffusers, liger-kernel, fla-core, mmdit, hyper-connections, torchtitan"
    monkeypatch.setattr(trial, "installed", lambda: {"transformers": "5.0"})
    assert trial.told() == f"on trial: transformers 5.0; not installed, so skipped: {absent}"
    monkeypatch.setattr(trial, "installed", dict)
    with pytest.raises(ValueError, match=f"none of transformers, {absent} is installed"):
        trial.told()


@pytest.mark.parametrize(
    "options",
    [
        ["kernels.py", "--peers"],
        ["--peers", "--since", "HEAD"],
        ["--markdown", "README.md"],
        ["--peers", "--markdown", "README.md", "--dtype", "float16"],
    ],
)
def test_options_that_do_not_go_together(options, capsys):
    assert cli.main(["check", *options]) == exit_status.WRONG_CALL
    assert "--peers" in capsys.readouterr().err


def test_the_command_judges_a_peer_and_says_what_is_on_trial(capfd):
    only = ["--implementation", "transformers-deepseek-v2-router", "--property", "parity", "--dtype", "float32", "--workers", "1"]
    assert cli.main(["check", "--peers", *only]) == exit_status.CONFORM
    printed = capfd.readouterr().out
    assert "on trial: transformers" in printed and "1 of 1 verdicts fails" in printed and trial.OTHERS in printed


def test_a_file_without_a_table_is_told(tmp_path):
    path = tmp_path / "table.md"
    with pytest.raises(ValueError, match="No such file"):
        trial.update(path, [PASSED], "2026-01-02")
    path.write_text("nothing")
    with pytest.raises(ValueError, match="no lines <!-- peers:begin -->"):
        trial.update(path, [PASSED], "2026-01-02")


def test_a_projection_that_is_left_out_rounds_as_autocast_would():
    states, linear = torch.randn(2, 3), torch.nn.Linear(3, 3)
    with without_projection():
        assert linear(states) is states
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(linear(states), states.bfloat16())
    assert linear(states).dtype == torch.float32 and not torch.equal(linear(states), states)


def test_peers_claim_nothing_that_is_not_documented():
    assert all(each.claims["validates"] is False for each in peers())
    assert peer.UNDOCUMENTED.keys() <= {name for each in peers() for name in each.claims}
