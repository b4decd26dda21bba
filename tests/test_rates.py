"""What measures the suite is right itself: the rates, with few cases."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

from dataclasses import replace
from pathlib import Path

import pytest

from gaugeblock.conformance.engine.exploration import PROFILES
from gaugeblock.conformance.engine.registry import contracts
from gaugeblock.conformance.selftest import rates
from gaugeblock.conformance.selftest.command import complaints, summarize, summarize_corners
from gaugeblock.conformance.selftest.corners import Caught, Corner
from gaugeblock.conformance.selftest.fault import faults
from gaugeblock.conformance.selftest.variant import Variant, every_case


def planted(contract: str, name: str, shrink_seconds: float = 1) -> rates.Kill:
    fault = next(each for each in faults() if (each.contract, each.name) == (contract, name))
    return rates.kill(fault, replace(PROFILES["quick"], shrink_seconds=shrink_seconds))


def test_kill_tells_what_was_caught_and_how_soon() -> None:
    kill = planted("experts.fused_swiglu", "last-row-of-a-full-tile-dropped", shrink_seconds=5)
    assert kill.killed and kill.cases <= 6
    assert kill.size is not None and kill.smallest is not None and kill.size <= 2 * kill.smallest
    assert kill.plain == tuple(rates.PLAIN_TESTS)  # a missing row is in no tolerance


def test_plain_tests_miss_what_no_tolerance_sees() -> None:
    assert planted("experts.fused_swiglu", "output-truncated").plain == ()
    assert planted("routers.softmax_topk", "strides-ignored").plain == ()


def test_a_printed_script_fails_again_and_only_if_it_does(tmp_path: Path) -> None:
    script = planted("routers.grouped_sigmoid_topk", "bias-in-the-weights").script
    assert rates.fails_again(script, str(tmp_path))
    mended = script.replace("'bias-in-the-weights'", "'reference'").replace(repr(rates.SOURCE), "None")
    assert mended != script
    assert not rates.fails_again(mended, str(tmp_path))
    assert not rates.fails_again("raise ValueError", str(tmp_path))


@pytest.mark.parametrize(
    ("contract", "regime"), [(name, regime.name) for name, row in contracts().items() for regime in row.regimes]
)
def test_no_trivial_result_passes(contract: str, regime: str) -> None:
    examples = 1 if contracts()[contract].rigid else 2  # a model, or a step of one, has hundreds of outputs and gradients
    found = rates.judge_trivial(contract, "float32", rates.drawn_cases(contract, regime, examples, seed=3))
    assert found.judged >= 7
    assert found.passed == []


def test_a_rejected_variant_is_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    contract = "experts.fused_swiglu"
    zeros = Variant(
        name="zeros",
        contract=contract,
        candidate=lambda: lambda tokens, *others: 0 * tokens,
        summary="",
        fits=every_case,
        claims={"differentiable": False},
    )
    monkeypatch.setattr(rates, "variants", lambda: (zeros,))
    found = rates.judge_variants(contract, "float32", rates.drawn_cases(contract, "dithered", examples=2, seed=0))
    assert found.judged == 2
    assert len(found.alarms) == 2
    assert found.plain == dict.fromkeys(rates.PLAIN_TESTS, 2)


def test_every_shortcoming_is_a_complaint() -> None:
    caught = rates.Kill("a.b", "c", "state", "parity", True, 1, "", 4, 2, "", ("assert_close",))
    survivor = replace(caught, killed=False, plain=())
    alarms = rates.Alarms(100, ["an alarm"], dict.fromkeys(rates.PLAIN_TESTS, 10))
    summary = summarize([caught, survivor], alarms, rates.Vacuity(10, ["zero outputs"], 1))
    corner = Caught(Corner("a.b", (("top_k", "2"),)), False, 9)
    summary["corners"] = summarize_corners([corner, replace(corner, caught=True)])
    assert summary["corners"]["planted"] == {"classes": 2, "pairs": 0} and summary["corners"]["caught"]["classes"] == 1
    summary["reproduction"] = {"scripts": 1, "fail_again": 0, "do_not": ["a.b c"]}
    summary["hostile"] = {"candidates": 2, "as_expected": 1, "not": ["os-exit: pass"]}
    assert [each.partition(":")[0] for each in complaints(summary)] == [
        "not caught",
        "not caught in a corner",
        "false alarm",
        "passed though trivial",
        "the script does not fail again",
        "hostile",
    ]
    assert summary["kill"]["killed"] == 1 and summary["kill"]["plain"]["assert_close"] == 1
    assert summary["shrinking"] == {"known_minima": 1, "at_the_minimum": 0, "within_twice": 1, "median_ratio": 2.0}
    assert summary["false_alarms"]["at_most_with_95_percent"] is None
