"""Mutants by rule: what the rules make, where they make it, and what is said of those that live; two of each contract die."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import argparse
import ast
import io
import textwrap
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console

from gaugeblock.conformance.engine.implementation import import_path
from gaugeblock.conformance.engine.registry import contracts, find_contract
from gaugeblock.conformance.exit_status import CONFORM, FAILS
from gaugeblock.conformance.selftest.mutants import command, equivalents, table
from gaugeblock.conformance.selftest.mutants.copies import between, path_of
from gaugeblock.conformance.selftest.mutants.judging import Outcome, apart, judge, judge_elsewhere
from gaugeblock.conformance.selftest.mutants.rules import RULES
from gaugeblock.conformance.selftest.mutants.sources import Mutant, Source, source_of
from gaugeblock.conformance.selftest.mutants.tracing import module_of, mutants_of, rows_of, trace

ROUTERS = "gaugeblock.reference.torch.routers"
KERNEL = "@triton.jit\ndef kernel(p, q, n):\n    "


def changes(text: str, rule: str) -> list[str]:
    """What a rule makes of the last line of a text, as text."""
    source = Source("snippet", f"import torch\n{text}\n")
    return [source.text_of(each.number).splitlines()[-1].strip() for each in source.mutants if each.rule == rule]


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        ("operator", "y = a + b", ["y = a - b"]),
        ("operator", "y //= 2", ["y %= 2"]),
        ("operator", "y = a and b", ["y = a or b"]),
        ("operator", "y = 'no ' + 'number'", []),
        ("side", "y = a - b", ["y = a", "y = b"]),
        ("side", "y += a", ["y = a"]),
        ("comparison", "y = a < b <= c", ["y = a <= b <= c", "y = a < b < c"]),
        ("comparison", "y = not a", ["y = a"]),
        ("constant", "y = f(3)", ["y = f(4)", "y = f(0)", "y = f(30)"]),
        ("constant", "y = f(0.5)", ["y = f(1.5)", "y = f(5.0)", "y = f(0.505)", "y = f(0.0)"]),
        ("constant", "y = x[1]", ["y = x[2]", "y = x[0]"]),
        ("constant", "y = f(keepdim=True)", ["y = f(keepdim=False)"]),
        ("constant", "y = x.sum(dim=1)", []),
        ("dimension", "y = x.sum(dim=1)", ["y = x.sum(dim=0)"]),
        ("dimension", "y = torch.softmax(x, -1)", ["y = torch.softmax(x, -2)"]),
        ("dimension", "y = x[:, None]", ["y = x[None, :]"]),
        ("dimension", "y = w.mT", ["y = w"]),
        ("sign", "y = -x", ["y = x"]),
        ("sign", "y = float('-inf')", ["y = float('inf')"]),
        ("cast", "y = x.float()", ["y = x"]),
        ("cast", "y = at_least_float32(x) * 2", ["y = x * 2"]),
        ("cast", "y = torch.zeros(3, dtype=torch.float32)", ["y = torch.zeros(3)"]),
        ("function", "y = x.sum()", ["y = x.mean()"]),
        ("function", "y = torch.exp(x)", ["y = torch.expm1(x)"]),
        ("function", "y = gelu(x)", ["y = torch.nn.functional.gelu(x)", "y = torch.nn.functional.silu(x)"]),
        ("function", "y = math.sqrt(x)", ["y = math.cbrt(x)"]),
        ("arguments", "y = f(a, b, a)", ["y = f(b, a, a)", "y = f(a, a, b)"]),
        ("arguments", "y = max(a, b)", []),
        ("arguments", "a, b = b, a", ["a, b = (a, b)"]),
        ("mask", "y = torch.where(m, a, b)", ["y = a", "y = b"]),
        ("mask", "y = tl.load(p, mask=m, other=0.0)", ["y = tl.load(p)", "y = tl.load(p, mask=m)"]),
        ("mask", "y = a if c else b", ["y = a", "y = b"]),
        ("statement", "check(x)", ["pass"]),
        ("accumulator", "y = x.sum(0)", ["y = x.to(torch.bfloat16).sum(0).to(x.dtype)"]),
        ("accumulator", "y = torch.float32", ["y = torch.bfloat16"]),
        ("rounding", f"{KERNEL}tl.store(p + n, v)", ["tl.store(p + n, v.to(p.dtype.element_ty, fp_downcast_rounding='rtz'))"]),
        ("function", f"{KERNEL}y = tl.cdiv(n, 4)", ["y = n // 4"]),
        ("accumulator", f"{KERNEL}y = tl.dot(p, q)", ["y = tl.dot(p, q).to(tl.bfloat16).to(tl.float32)"]),
    ],
)  # fmt: skip
def test_a_rule_makes_what_it_says(rule: str, before: str, after: list[str]) -> None:
    assert changes(before, rule) == after


def test_every_rule_is_tried() -> None:
    (parameters,) = (each for each in test_a_rule_makes_what_it_says.pytestmark if each.name == "parametrize")  # type: ignore[attr-defined]
    assert {each[0] for each in parameters.args[1]} == set(RULES)


def test_statements_are_left_out_where_python_stays_whole() -> None:
    text = textwrap.dedent("""
        import jax
        def f(x, y: int = 3):
            \"\"\"Says 1 + 1.\"\"\"
            z = x
            if y < 0:
                word = "small" * 2
                raise ValueError(f"y must be {0 + 1}, got {y - 1}")
            for _ in range(y):
                z = z + x
                total = x
            return z
        """)
    found = Source("snippet", text).mutants
    assert {(each.line, each.before) for each in found if each.rule == "statement"} == {
        (6, "if y < 0:"),
        (10, "z = z + x"),  # not `total`, which has no value before
    }
    assert {each.line for each in found} == {6, 10}  # nothing of what is said, demanded or raised


@pytest.mark.parametrize("module", ["reference.torch.routers", "reference.validation.arrays", "optimized.triton.topk"])
def test_no_mutant_is_the_module_itself_or_another_mutant(module: str) -> None:
    source = source_of(f"gaugeblock.{module}")
    texts = [source.text_of(each.number) for each in source.mutants]
    assert len({*texts, ast.unparse(source.tree)}) == len(texts) + 1 > 50
    assert all(ast.unparse(ast.parse(each)) == each for each in texts)


def the_mutant(module: str, text: str, change: str) -> Mutant:
    return next(each for each in source_of(module).mutants if each.text.startswith(text) and each.change == change)


def test_only_what_leads_to_the_change_is_copied() -> None:
    import torch

    mutant = the_mutant(ROUTERS, "weights_TK = weights_TK / ", "weights_TK / weights_TK.sum(dim=-1, keepdim=True) -> weights_TK")
    changed = import_path(path_of(mutant, f"{ROUTERS}:softmax_topk"))
    logits = torch.zeros(1, 4)
    assert changed(logits, top_k=2, renormalize=True)[0].tolist() == [[0.25, 0.25]]
    assert import_path(f"{ROUTERS}:softmax_topk")(logits, top_k=2, renormalize=True)[0].tolist() == [[0.5, 0.5]]
    assert set(between("gaugeblock.reference.torch.dit", "gaugeblock.reference.validation.routers")) == {
        "gaugeblock.reference.torch.dit", "gaugeblock.reference.torch.layers", "gaugeblock.reference.torch.random",
        "gaugeblock.reference.validation", "gaugeblock.reference.validation.biased_moe_layers",
        "gaugeblock.reference.validation.dit_moe_layers", "gaugeblock.reference.validation.grouped_moe_layers",
        "gaugeblock.reference.validation.noisy_routers", "gaugeblock.reference.validation.routers",
        "gaugeblock.reference.validation.soft_routers", "gaugeblock.reference.validation.token_choices",
        "gaugeblock.reference.validation.unmasking", "gaugeblock.reference.validation.upcycling",
    }  # fmt: skip
    assert not between(ROUTERS, "gaugeblock.optimized.triton.topk")


@cache
def traced(contract: str, implementation: str) -> list[Mutant]:
    row = next(each for each in rows_of(find_contract(contract)) if each.name == implementation)
    return [mutant for mutant, _ in mutants_of([trace(find_contract(contract), row)])]


def test_lines_that_cases_run_are_found() -> None:
    of_routers = [each for each in traced("routers.softmax_topk", "reference") if each.module == ROUTERS]
    assert {each.function for each in of_routers} == {"softmax_topk"}  # and no other router
    assert any("weights_TK.sum" in each.before for each in of_routers)  # under a condition
    of_arrays = {each.function for each in traced("routers.softmax_topk", "reference") if each.module.endswith("arrays")}
    assert of_arrays == {"require_dtype", "require_shape", "require_between"}


def test_lines_of_kernels_and_of_their_backward_pass_are_found() -> None:
    functions = {each.function for each in traced("routers.softmax_topk", "triton")}
    assert {"_forward", "_backward", "choose_lanes", "_Route.backward"} <= functions
    assert "_keep_best_groups" not in functions
    epsilon = [each for each in traced("routers.grouped_sigmoid_topk", "triton") if "SUM_EPSILON" in each.text]
    assert any(each.function == "" for each in epsilon)  # a constant of the module that a kernel uses


NO_SUM = the_mutant(ROUTERS, "weights_TK = weights_TK / ", "weights_TK / weights_TK.sum(dim=-1, keepdim=True) -> weights_TK")


def test_a_blind_spot_is_reported_with_its_place_and_change() -> None:
    blind = judge("routers.softmax_topk", "reference", NO_SUM, ["determinism"])
    assert (blind.killed_by, blind.dtype, blind.unsound) == ("", "float32", "")  # bfloat16 came first
    assert table.survivors([blind], []) == [blind]
    console = Console(record=True, width=500, file=io.StringIO())
    table.print_outcomes([blind], [], [], 1.0, console)
    line = next(each for each in console.export_text().splitlines() if each.startswith("survives"))
    lines = Path("reference/torch/routers.py").read_text().splitlines()
    number = 1 + next(place for place, each in enumerate(lines) if "= weights_TK /" in each)
    assert f"reference/torch/routers.py:{number} (softmax_topk), side: weights_TK / weights_TK.sum(" in line
    assert "-> weights_TK   in: weights_TK = weights_TK / " in line


def test_a_mutant_is_killed_in_its_hardest_dtype_and_the_property_is_named() -> None:
    seen = judge("routers.softmax_topk", "reference", NO_SUM)
    assert (seen.killed_by, seen.dtype, seen.is_easier, seen.unsound) == ("parity", "bfloat16", False, "")
    assert table.survivors([seen], []) == [] and table.summary([seen], [])["all"]["killed"] == 1


def test_a_helper_that_survives_is_judged_where_else_it_is_used() -> None:
    device = the_mutant(
        "gaugeblock.reference.validation.arrays", "if not _is_readable(array):", "not _is_readable(array) -> _is_readable(array)"
    )  # of the range of ids, which no objective has
    before = Outcome(device, "objectives.rectified_flow_velocity", "reference")
    after = judge_elsewhere(before)
    assert after.killed_by == "rejections" and after.contract != before.contract


def test_every_kernel_of_a_contract_gets_a_second_chance() -> None:
    """What a backward pass computes again is computed by one of them alone."""
    rows = rows_of(find_contract("experts.fused_swiglu"))
    names = {each.name for each in apart(rows)}
    assert {"reference", "reference-jax", "triton", "triton-fast", "triton-recomputed"} <= names
    assert len(names) < len(rows)


def entry(mutant: Mutant, **changed: object) -> equivalents.Equivalent:
    whole = {
        "module": mutant.module.removeprefix("gaugeblock."),
        "function": mutant.function,
        "line": mutant.text,
        "changes": (equivalents.change_of(mutant),),
        "reason": "a test says so",
    }
    return equivalents.Equivalent(**whole | changed)  # type: ignore[arg-type]


def test_an_equivalent_that_is_killed_is_an_error() -> None:
    alive, dead = (Outcome(NO_SUM, "routers.softmax_topk", "reference", killed_by=by) for by in ("", "parity"))
    listed = [entry(NO_SUM)]
    assert equivalents.wrong(listed, [alive]) == [] and table.survivors([alive], listed) == []
    (remark,) = equivalents.wrong(listed, [dead])
    assert "killed by parity" in remark and "softmax_topk" in remark


@pytest.mark.parametrize("changed", [{"line": "weights_TK = 3"}, {"function": "f"}, {"changes": ("side: a -> b",)}])
def test_an_equivalent_that_no_rule_makes_is_an_error(changed: dict[str, object]) -> None:
    assert equivalents.stale([entry(NO_SUM)]) == []
    (remark,) = equivalents.stale([entry(NO_SUM, **changed)])
    assert "made by no rule" in remark


def test_entries_are_whole(tmp_path: Path) -> None:
    file = tmp_path / "equivalents.toml"
    file.write_text('[[equivalent]]\nmodule = "reference.torch.routers"\nreason = "no line"\n')
    with pytest.raises(ValueError, match="entry 1 must have changes, function, line, module, reason"):
        equivalents.load_equivalents(file)


def test_what_is_listed_is_made_by_a_rule_and_listed_once() -> None:
    listed = equivalents.load_equivalents()
    assert equivalents.stale(listed) == []
    told = [(each.module, each.function, each.line, change) for each in listed for change in each.changes]
    assert len(told) == len(set(told))


def test_a_sample_is_the_same_every_time_and_of_many_rules() -> None:
    mutants = [(each, "reference") for each in source_of(ROUTERS).mutants]
    chosen = command.sampled(mutants, 8)
    assert chosen == command.sampled(mutants, 8) and len({each[0].rule for each in chosen}) == 8


def test_a_mutant_belongs_to_the_smallest_contract_that_runs_it() -> None:
    shared = [(each, "reference") for each in source_of(ROUTERS).mutants[:90]]
    planned = command.shared_out({"large": shared, "small": shared[:70]})
    assert planned["small"] == shared[:70]
    assert planned["large"][:20] == shared[70:] and len(planned["large"]) == command.FEWEST


@pytest.mark.parametrize("name", contracts())
def test_two_mutants_of_each_contract_are_killed(name: str) -> None:
    contract, listed = find_contract(name), equivalents.load_equivalents()
    rows = (
        [each for each in rows_of(contract) if each.kind in ("reference", "triton")]
        if contract.cases > 0.25
        else [rows_of(contract)[0]]
    )
    row = rows[list(contracts()).index(name) % len(rows)]
    mutants = [(each, row.name) for each in traced(name, row.name) if each.module == module_of(row)]
    some = command.sampled([each for each in mutants if not equivalents.is_listed(listed, each[0])], 2)
    outcomes = [judge(name, row.name, mutant) for mutant, _ in some]
    assert len(outcomes) == 2
    for outcome in table.survivors(outcomes, listed):  # its line may be about what another contract of the module asks for
        others = [(other.name, each) for other in contracts().values() for each in rows_of(other) if other.name != name]
        siblings = [(other, each.name) for other, each in others if module_of(each) == outcome.mutant.module]
        assert any(judge(*each, outcome.mutant).killed_by for each in siblings), outcome


def test_the_command_ends_as_its_survivors_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, file = "objectives.rectified_flow_velocity", tmp_path / "mutants.json"
    options = argparse.Namespace(mutants=name, sample=3, workers=1, json=file)
    assert command.run_mutants(options) == CONFORM
    assert "3 mutants" in capsys.readouterr().out and file.exists()
    monkeypatch.setattr(command, "load_equivalents", lambda: (replace(entry(NO_SUM), line="gone"),))
    assert command.run_mutants(options) == FAILS
    assert "made by no rule" in capsys.readouterr().out
