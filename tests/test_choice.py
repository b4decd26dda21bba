"""Ids that a candidate chose: right if and only if the scores and their error allow them."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaugeblock.conformance.engine.budget.decisions import replay_of
from gaugeblock.conformance.engine.budget.error_budget import KAPPA, Budget
from gaugeblock.conformance.engine.contract import Contract, Regime
from gaugeblock.conformance.engine.frameworks import Call, call_torch
from gaugeblock.conformance.engine.inputs.cases import Case, make_inputs, options
from gaugeblock.conformance.engine.judging.choice import check_choice, must_and_may
from gaugeblock.conformance.engine.judging.judge import Violation, judge
from gaugeblock.conformance.engine.registry import find_contract

ROUTER = find_contract("routers.softmax_topk")
GROUPED = find_contract("routers.grouped_sigmoid_topk")
SAMPLED = find_contract("capacity_routers.gshard_top2")


def results_of(contract: Contract, case: Case) -> dict[str, torch.Tensor]:
    """What the reference returns for a case."""
    call = Call(make_inputs(contract, case, "float32"), options(contract, case))
    return call_torch(contract, contract.reference, call)


# -------------------------------------------------------------------------------------- which ids are allowed


def sharp(*rows: tuple[float, ...]) -> Budget:
    """Scores that are known but for the rounding of float32."""
    return uncertain(0.0, *rows)


def uncertain(deviation: float, *rows: tuple[float, ...]) -> Budget:
    scores = torch.tensor(rows, dtype=torch.float64)
    return Budget(scores, torch.full_like(scores, deviation**2), 0.0, 0.0)


def allowed(scores: Budget, top_k: int, groups: Budget | None = None, topk_groups: int = 0):
    """Sets of ids of the first row: those that must, and those that may be chosen."""
    must, may = must_and_may(scores, top_k, groups, topk_groups)
    return {*must[0].nonzero().flatten().tolist()}, {*may[0].nonzero().flatten().tolist()}


def test_clear_scores_leave_no_choice():
    assert allowed(sharp((1.0, 3.0, 2.0)), 2) == ({1, 2}, {1, 2})


def test_of_tied_scores_any_may_be_chosen_and_none_must():
    assert allowed(sharp((2.0, 1.0, 1.0, 1.0, 0.0)), 2) == ({0}, {0, 1, 2, 3})
    assert allowed(sharp((-0.0, 0.0)), 1) == (set(), {0, 1})


def test_ties_inside_the_chosen_ones_change_nothing():
    assert allowed(sharp((2.0, 2.0, 1.0)), 2) == ({0, 1}, {0, 1})


def test_scores_within_each_others_error_count_as_tied():
    assert allowed(uncertain(0.1, (5.0, 4.0, 1.0)), 1) == (set(), {0, 1})
    assert allowed(uncertain(0.01, (5.0, 4.0, 1.0)), 1) == ({0}, {0})


def test_scores_of_minus_infinity_are_chosen_only_if_nothing_else_is_left():
    assert allowed(sharp((-math.inf, 1.0, -math.inf)), 1) == ({1}, {1})
    assert allowed(sharp((-math.inf, 1.0, -math.inf)), 2) == ({1}, {0, 1, 2})


def test_a_row_with_nan_may_be_anything_and_other_rows_are_judged():
    must, may = must_and_may(sharp((math.nan, 1.0, 0.0), (0.0, 1.0, 2.0)), 1)
    assert must.tolist() == [[False] * 3, [False, False, True]]
    assert may.tolist() == [[True] * 3, [False, False, True]]


def test_experts_outside_the_kept_groups_may_not_be_chosen():
    scores = sharp((9.0, 0.0, 5.0, 6.0))
    assert allowed(scores, 1, groups=sharp((9.0, 11.0)), topk_groups=1) == ({3}, {3})
    assert allowed(scores, 1, groups=sharp((9.0, 11.0)), topk_groups=2) == ({0}, {0})


def test_of_tied_groups_either_may_be_kept():
    assert allowed(sharp((9.0, 0.0, 5.0, 4.0)), 1, groups=sharp((9.0, 9.0)), topk_groups=1) == (set(), {0, 2})


@given(
    scores=st.lists(st.integers(0, 12), min_size=2, max_size=8),
    deviation=st.sampled_from([0.0, 0.05, 0.2]),
    data=st.data(),
)
@settings(max_examples=100, derandomize=True, database=None, deadline=None)
def test_whatever_the_true_scores_the_best_are_between_must_and_may(scores, deviation, data):
    top_k = data.draw(st.integers(1, len(scores)))
    errors = data.draw(st.lists(st.floats(-1, 1), min_size=len(scores), max_size=len(scores)))
    true = torch.tensor(scores) + KAPPA * deviation * torch.tensor(errors, dtype=torch.float64)
    best = {*true.topk(top_k).indices.tolist()}
    must, may = allowed(uncertain(deviation, tuple(map(float, scores))), top_k)
    assert must <= best <= may


# ------------------------------------------------------------------------------------- the candidate's choice

CHOOSING = Case(num_tokens=5, num_experts=8, top_k=3, renormalize=True, regime="dithered", seed=1)


@pytest.fixture
def chosen():
    return results_of(ROUTER, CHOOSING)


def violation_of(results, contract=ROUTER, case=CHOOSING) -> Violation:
    with pytest.raises(Violation) as violation:
        judge(contract, case, "float32", "strict", results)
    return violation.value


def test_the_references_choice_is_right_in_any_integer_dtype(chosen):
    ids = check_choice(ROUTER, CHOOSING, "float32", chosen | {"topk_ids": chosen["topk_ids"].to(torch.uint8)})
    assert torch.equal(ids, chosen["topk_ids"]) and ids.dtype == torch.int64


def test_ids_must_be_sorted_by_descending_score(chosen):
    chosen["topk_ids"][2] = chosen["topk_ids"][2].flip(0)
    violation = violation_of(chosen)
    assert violation.message == "topk_ids is not sorted by descending score"
    assert violation.details == (f"topk_ids[2] = {chosen['topk_ids'][2].tolist()}",)


@pytest.mark.parametrize("stray", [8, -1])
def test_ids_must_be_in_range(chosen, stray):
    chosen["topk_ids"][4, 0] = stray
    assert violation_of(chosen).message == "topk_ids is out of range 0..7"


def test_ids_must_be_distinct(chosen):
    chosen["topk_ids"][3, 2] = chosen["topk_ids"][3, 0]
    violation = violation_of(chosen)
    assert violation.message == "topk_ids holds an id twice in one row"
    assert "rows 3" in violation.diagnosis


def test_ids_must_be_among_the_best(chosen):
    everyone = results_of(ROUTER, CHOOSING.replace(top_k=8))["topk_ids"]
    worst = int(everyone[0, -1])
    chosen["topk_ids"][0, 2] = worst
    assert violation_of(chosen).message == f"topk_ids: id {worst} is chosen, though it cannot be among the best"


def choice_of_second_experts(**changes):
    """A case in which each token chooses two of eight experts, the second by noisy logits, and what the reference returns."""
    case = Case(**SAMPLED.landmarks[1] | {"num_experts": 8}, regime="dithered", traits=("no padding",)).replace(**changes)
    return case, results_of(SAMPLED, case)


def test_what_is_chosen_one_by_one_is_scored_place_by_place():
    case, results = choice_of_second_experts()
    check_choice(SAMPLED, case, "float32", results)
    noisy = make_inputs(SAMPLED, case, "float32")
    probable = noisy["router_logits"].topk(2).indices
    wrong = (probable != results["topk_ids"]).any(1).nonzero()[0].item()  # where the noise chose another second one
    results["topk_ids"][wrong] = probable[wrong]
    message = f"topk_ids: id {probable[wrong, 1]} is chosen, though it cannot be among the best"
    assert violation_of(results, SAMPLED, case).message == message


def test_what_is_chosen_one_by_one_is_distinct():
    case, results = choice_of_second_experts()
    results["topk_ids"][3, 1] = results["topk_ids"][3, 0]
    assert violation_of(results, SAMPLED, case).message == "topk_ids holds an id twice in one row"


def test_what_is_chosen_first_decides_what_is_left_for_the_second():
    case, results = choice_of_second_experts(regime="ties", second_expert_policy="all", traits=())
    mask = make_inputs(SAMPLED, case, "float32")["attention_mask"]
    tied = int(mask[::3].nonzero()[0]) * 3  # every third row is one tie of all experts
    results["topk_ids"][tied] = torch.tensor([7, 5])
    check_choice(SAMPLED, case, "float32", results)


def test_another_choice_among_ties_is_right_and_weights_are_judged_there():
    case = CHOOSING.replace(regime="ties", num_tokens=3)
    results = results_of(ROUTER, case)  # the first row of this regime is one tie of all experts
    results["topk_ids"][0] = torch.tensor([7, 5, 6])
    judge(ROUTER, case, "float32", "strict", results)
    results["topk_weights"][0, 0] *= 1.001
    assert violation_of(results, case=case).message.startswith("topk_weights: ")


def test_ids_must_come_from_as_many_groups_as_are_kept():
    def all_equal(draw, parameters):
        experts = parameters["num_experts"]
        return {"router_logits": torch.zeros(3, experts), "e_score_correction_bias": torch.zeros(experts)}

    contract = replace(GROUPED, regimes=(Regime("all equal", all_equal, "worst element"),))
    case = Case(
        num_tokens=3, num_experts=4, top_k=2, num_groups=2, topk_groups=1, renormalize=True,
        routed_scaling_factor=1.0, regime="all equal",
    )  # fmt: skip
    results = results_of(contract, case)
    results["topk_ids"] = torch.tensor([[0, 1], [3, 2], [1, 0]])
    judge(contract, case, "float32", "strict", results)
    results["topk_ids"][1] = torch.tensor([0, 2])
    assert "group" in violation_of(results, contract, case).message


@pytest.mark.parametrize(
    ("contract", "activation"),
    [(ROUTER, partial(torch.softmax, dim=-1)), (GROUPED, torch.sigmoid)],
    ids=["softmax", "sigmoid"],
)
def test_a_replayed_choice_decides_weights_and_gradients(contract, activation):
    case = Case(**contract.landmarks[1], regime="dithered", seed=2)  # whose weights are the chosen scores
    logits, *others = make_inputs(contract, case, "float32").values()
    logits.requires_grad_()

    def run():
        return dict(
            zip(("topk_weights", "topk_ids"), contract.reference(logits, *others, **options(contract, case)), strict=True)
        )

    chosen = run()["topk_ids"].flip(0)
    replayed = replay_of(run, "topk_ids", chosen)()
    scores = activation(logits)
    expected = scores.gather(1, chosen) * case.parameters.get("routed_scaling_factor", 1.0)
    assert torch.equal(replayed["topk_ids"], chosen) and torch.equal(replayed["topk_weights"], expected)
    gradients = [torch.autograd.grad(each.square().sum(), logits)[0] for each in (replayed["topk_weights"], expected)]
    assert torch.equal(*gradients)
