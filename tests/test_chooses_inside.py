"""An operation that does not return what it chooses is judged in cases where rounding decides nothing."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from gaugeblock.conformance.engine.budget.decisions import Decisions, DecisionsAtOnce, rounding_decides
from gaugeblock.conformance.engine.budget.oracle import exact_inputs, reference_run
from gaugeblock.conformance.engine.budget.runs import RunsDiffer
from gaugeblock.conformance.engine.contract import Contract, ContractError
from gaugeblock.conformance.engine.exploration import PROFILES, examine
from gaugeblock.conformance.engine.frameworks import Call, call_torch
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.inputs.cases import REDRAWS, Case, make_inputs, options
from gaugeblock.conformance.engine.judging.judge import Violation, judge
from gaugeblock.conformance.engine.properties import find_property
from gaugeblock.conformance.engine.registry import contracts, find_contract
from gaugeblock.conformance.engine.trial import Subject
from gaugeblock.reference.torch import moe_layers

MIXTRAL = find_contract("moe_layers.mixtral_moe")
SIZES = MIXTRAL.landmarks[1] | {"num_tokens": 24}


def silent(hidden_states, state, *, top_k):
    """A MoE layer that returns its hidden states alone."""
    return moe_layers.mixtral_moe(hidden_states, state, top_k=top_k)[0]


def silent_softmax_of_chosen(hidden_states, state, *, top_k):
    return MIXTRAL.formulas[0](hidden_states, state, top_k=top_k)[0]


SILENT: Contract = replace(
    MIXTRAL,
    name="moe_layers.silent_moe",
    reference=silent,
    formulas=(silent_softmax_of_chosen,),
    outputs=MIXTRAL.outputs[:1],
    selection=None,
    chooses_inside=True,
    regimes=tuple(each for each in MIXTRAL.regimes if each.name not in ("ties", "lattice")),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cases_are_redrawn_until_rounding_decides_nothing(dtype):
    redrawn = 0
    for seed in range(4):
        case = Case(**SIZES, regime="dithered", seed=seed)
        drawn, exact = (exact_inputs(each, case, dtype) for each in (replace(SILENT, chooses_inside=False), SILENT))
        unclear = rounding_decides(SILENT, drawn, options(SILENT, case), dtype, ties_matter=True)
        assert unclear != torch.equal(drawn["hidden_states"], exact["hidden_states"])
        redrawn += unclear
    assert (redrawn > 0) == (dtype == "bfloat16")


def test_runs_at_once_decide_as_runs_one_by_one(monkeypatch):
    def unclear(case: Case) -> bool:
        drawn = exact_inputs(replace(SILENT, chooses_inside=False), case, "bfloat16")
        return rounding_decides(SILENT, drawn, options(SILENT, case), "bfloat16", ties_matter=True)

    def refused(self):
        raise RunsDiffer("no form for all at once")

    cases = [Case(**SIZES, regime="dithered", seed=seed) for seed in range(24)]
    at_once = [unclear(case) for case in cases]
    monkeypatch.setattr(DecisionsAtOnce, "__enter__", refused)
    one_by_one = [unclear(case) for case in cases]
    # twelve runs each, of other noise: what one run in six turns is seen by both, or by neither, four times in five
    assert sum(map(bool.__eq__, at_once, one_by_one)) >= 18 and 4 <= sum(at_once) <= 22


def test_a_case_is_redrawn_in_the_same_way_every_time():
    case = Case(**SIZES, regime="dithered", seed=3)
    again = replace(SILENT, name="moe_layers.another")  # which shares no cache
    for key, tensor in make_inputs(SILENT, case, "bfloat16").items():
        assert torch.equal(tensor, make_inputs(again, case, "bfloat16")[key])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_layers_conform_and_a_wrong_choice_does_not(dtype):
    for seed in range(6):
        case = Case(**SIZES, regime="dithered", seed=seed)
        call = Call(make_inputs(SILENT, case, dtype), options(SILENT, case))
        results = call_torch(SILENT, silent, call)
        judge(SILENT, case, dtype, "eager", results)
        judge(SILENT, case, dtype, "eager", call_torch(SILENT, silent_softmax_of_chosen, call))
    hidden = call.inputs["hidden_states"]
    call.inputs["hidden_states"] = -hidden
    other = call_torch(SILENT, silent, call)["hidden_states_out"]
    results["hidden_states_out"][0] = other[0]
    with pytest.raises(Violation, match="hidden_states_out"):
        judge(SILENT, case, dtype, "eager", results)


class Layer:
    """A silent layer on trial, right or not."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, hidden_states, state, *, top_k):
        return self.factor * silent(hidden_states, state, top_k=top_k)


@pytest.mark.parametrize("prop", ["parity", "gradients", "layout", "hidden_state"])
def test_the_gate_judges_a_layer_that_does_not_return_its_ids(prop, monkeypatch):
    monkeypatch.setitem(contracts(), SILENT.name, SILENT)
    for factor in (1.0, 1.01):
        implementation = Implementation(SILENT.name, "a layer", Layer(factor), dtypes=("float32",))
        profile = replace(PROFILES["quick"], examples=2)
        verdict = examine(Subject(implementation, "float32", "cpu"), find_property(prop), profile)
        assert verdict.status == ("pass" if factor == 1 else "fail"), verdict.reason


def test_where_every_case_ties_no_seed_works():
    with pytest.raises(ContractError, match=f"near a tie in .* with every one of {REDRAWS} seeds"):
        contract = replace(SILENT, regimes=MIXTRAL.regimes)
        make_inputs(contract, Case(**MIXTRAL.landmarks[2], regime="ties"), "float32")


def test_a_number_is_finite_whatever_disturbs_it():
    """What torch compares with itself."""
    with Decisions(jitter=torch.Generator().manual_seed(0)) as watched:
        assert torch.arange(1.0, 9.0).isfinite().all()
    assert watched.decided()


def test_who_is_said_to_choose_must_decide_something():
    contract = replace(find_contract("experts.fused_swiglu"), chooses_inside=True)
    with pytest.raises(ContractError, match="said to choose inside, but its reference makes no decision"):
        make_inputs(contract, Case(**contract.landmarks[0], regime="dithered"), "float32")


def test_every_contract_whose_reference_takes_indices_says_so():
    """But one that returns nothing else than what it chooses: that is judged, in cases that leave no doubt."""
    for contract in contracts().values():
        returns_numbers = any(each.dtype not in ("bool", "int64") for each in contract.outputs)
        if contract.selection is None and not contract.chooses_inside and returns_numbers:
            case = Case(**contract.landmarks[0], regime=contract.regimes[0].name)
            exact, opts = exact_inputs(contract, case, "float32"), options(contract, case)
            with Decisions() as watched:
                reference_run(contract, exact, opts)
            is_uncertain = partial(rounding_decides, contract, exact, opts, "float32", ties_matter=False)
            assert all(each.dtype == torch.bool for each in watched.decided()) or not is_uncertain(), contract.name
