"""Choices of every kind: however a reference is written, its choice is judged by scores and replayed."""

import math
from dataclasses import replace

import pytest
import torch

from gaugeblock.conformance.engine.budget.decisions import Decisions, replay_of
from gaugeblock.conformance.engine.contract import Contract, ContractError, Input, Output, Regime, Selection
from gaugeblock.conformance.engine.frameworks import Call, call_torch
from gaugeblock.conformance.engine.inputs.cases import Case, make_inputs, options
from gaugeblock.conformance.engine.judging.judge import Violation, judge
from gaugeblock.conformance.engine.registry import find_contract

ROWS, CANDIDATES = 6, 5
CASE = Case(num_tokens=ROWS, num_candidates=CANDIDATES, count=2, regime="ties")
LOGITS = Input("logits", ("num_tokens", "num_candidates"), differentiable=True)


def tied(draw, parameters):
    """The first row is one tie; the others are clear."""
    logits = draw.permutation(ROWS * CANDIDATES).reshape(ROWS, CANDIDATES).double() / 8
    logits[0] = 0.25
    return {"logits": logits}


def probabilities(logits, *_, **__):
    return torch.softmax(logits, -1)


def contract_of(reference, selection: Selection, shape=("num_tokens", "count"), dtype="int64", **changes) -> Contract:
    """A contract whose reference returns probabilities `[T, C]` or those of the chosen, and the choice."""
    outputs = (
        Output("values", ("num_tokens", *shape[1:]), dtype="float32", differentiable=True),
        Output("choice", shape, dtype=dtype, indexes=None if dtype == "bool" else "num_candidates"),
    )
    return replace(
        find_contract("routers.softmax_topk"), name=f"tests.{reference.__name__}", reference=reference, inputs=(LOGITS,),
        outputs=outputs, options=("count",), landmarks=(CASE.parameters,), factors=(), traits=(), workloads=(),
        regimes=(Regime("ties", tied, "worst element"),), formulas=(), selection=selection, **changes,
    )  # fmt: skip


def with_topk(logits, *, count):
    p = torch.softmax(logits, -1)
    values, ids = p.topk(count, -1)
    return values, ids


def with_sort(logits, *, count):
    values, ids = torch.softmax(logits, -1).sort(-1, descending=True)
    return values[:, :count], ids[:, :count].to(torch.int32)


def with_stable_argsort(logits, *, count):
    p = torch.softmax(logits, -1)
    ids = p.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return p.gather(-1, ids), ids


def with_one_maximum_after_the_other(logits, *, count):
    p = torch.softmax(logits, -1)
    left, values, ids = p, [], []
    for _ in range(count):
        value, best = left.max(-1)
        left = left.scatter(-1, best[:, None], -1.0)
        values.append(value)
        ids.append(best)
    return torch.stack(values, -1), torch.stack(ids, -1)


@pytest.mark.parametrize("reference", [with_topk, with_sort, with_stable_argsort, with_one_maximum_after_the_other])
def test_ids_are_replayed_however_they_were_chosen(reference):
    check(contract_of(reference, Selection("choice", probabilities, "count")), torch.tensor([4, 3]), torch.tensor([1, 1]))


def with_argmax(logits, *, count):
    p = torch.softmax(logits, -1)
    ids = p.argmax(-1)
    return p.gather(-1, ids[:, None]).squeeze(-1), ids


def with_max(logits, *, count):
    values, ids = torch.softmax(logits, -1).max(-1)
    return values, ids


def with_topk_of_one(logits, *, count):
    values, ids = torch.softmax(logits, -1).topk(1)
    return values[:, 0], ids[:, 0]


@pytest.mark.parametrize("reference", [with_argmax, with_max, with_topk_of_one])
def test_an_argmax_is_replayed_however_it_was_taken(reference):
    check(contract_of(reference, Selection("choice", probabilities, 1), ("num_tokens",)), torch.tensor(3), torch.tensor(0))


def where_sure(logits, *, count, least=0.2 - 1e-9):
    """The best, or -1 where no probability is above a row's flat share."""
    p = torch.softmax(logits, -1)
    value, best = p.max(-1)
    sure = value > least
    return torch.where(sure, p.gather(-1, best[:, None])[:, 0], 0.0), torch.where(sure, best, -1)


def where_surer(logits, *, count):
    return where_sure(logits, count=count, least=0.2 + 1e-9)


@pytest.mark.parametrize(("reference", "other"), [(where_surer, 3), (where_sure, -1)])
def test_that_nothing_is_chosen_is_a_choice(reference, other):
    selection = Selection("choice", probabilities, 1, above=0.2, none=-1)
    check(contract_of(reference, selection, ("num_tokens",)), torch.tensor(other), None)


def test_nothing_may_not_be_chosen_where_something_is_sure():
    contract = contract_of(where_sure, Selection("choice", probabilities, 1, above=0.2, none=-1), ("num_tokens",))
    results = results_of(contract)
    results["choice"][2], results["values"][2] = -1, 0.0
    with pytest.raises(Violation, match=r"choice: id \d is not chosen"):
        judge(contract, CASE, "float32", "strict", results)


def with_a_threshold(logits, *, count):
    p = torch.softmax(logits, -1)
    above = p > 0.2
    return torch.where(above, p, 0.0), above


def with_its_opposite(logits, *, count):
    p = torch.softmax(logits, -1)
    return p.masked_fill(p <= 0.2, 0.0), ~(p <= 0.2)


def with_valid_columns(logits, *, count):
    p = torch.softmax(logits, -1)
    above = (p > 0.2) & (torch.arange(p.shape[1]) < CANDIDATES)
    return p * above, above


@pytest.mark.parametrize("reference", [with_a_threshold, with_its_opposite, with_valid_columns])
def test_a_threshold_is_replayed(reference):
    selection = Selection("choice", probabilities, None, above=0.2)
    contract = contract_of(reference, selection, ("num_tokens", "num_candidates"), "bool")
    check(contract, torch.tensor([True, False, True, True, False]), None)


def with_a_mask_of_ids(logits, *, count):
    p = torch.softmax(logits, -1)
    mask = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.topk(count, -1).indices, True)
    return p * mask, mask


def with_the_lowest_that_is_in(logits, *, count):
    """The mask of all that reach the best but one; no two probabilities are equal but where they tie."""
    p = torch.softmax(logits + 1e-12 * torch.arange(CANDIDATES), -1)
    mask = p >= p.kthvalue(CANDIDATES - count + 1, dim=-1, keepdim=True).values
    return p * mask, mask


@pytest.mark.parametrize("reference", [with_a_mask_of_ids, with_the_lowest_that_is_in])
def test_a_mask_of_the_best_is_replayed(reference):
    contract = contract_of(reference, Selection("choice", probabilities, "count"), ("num_tokens", "num_candidates"), "bool")
    right, many = [True, False, True, False, False], [True, True, True, False, False]
    check(contract, torch.tensor(right), torch.tensor(many))


def with_a_uniform_number(logits, uniform, *, count):
    """A token sampled by its interval of probabilities."""
    p = torch.softmax(logits, -1)
    ids = torch.searchsorted(p.cumsum(-1), uniform[:, None], right=True)[:, 0].clamp(max=p.shape[1] - 1)
    return p.gather(-1, ids[:, None])[:, 0], ids


def inside_the_interval(logits, uniform, **_):
    p = torch.softmax(logits, -1)
    ends = p.cumsum(-1)
    return torch.minimum(ends - uniform[:, None], uniform[:, None] - (ends - p))


def test_a_sampled_token_is_replayed():
    """In the first row the number lies between the tokens' intervals once it is 2/5."""

    def at_an_end(draw, parameters):
        uniform = torch.full((ROWS,), 0.5, dtype=torch.float64)
        uniform[0] = 0.4
        return tied(draw, parameters) | {"uniform": uniform}

    contract = contract_of(with_a_uniform_number, Selection("choice", inside_the_interval, 1), ("num_tokens",))
    contract = replace(
        contract,
        inputs=(LOGITS, Input("uniform", ("num_tokens",), dtype="float32")),
        regimes=(Regime("ties", at_an_end, "worst element"),),
    )
    check(contract, torch.tensor(1), None)
    results = results_of(contract)
    results["choice"][0] = 3
    with pytest.raises(Violation, match="id 3 is chosen, though it cannot be among the best"):
        judge(contract, CASE, "float32", "strict", results)


def everything_sorted(logits, *, count):
    values, ids = torch.softmax(logits, -1).sort(-1, descending=True)
    return values, ids


def test_a_sort_is_a_choice_of_its_order():
    contract = contract_of(
        everything_sorted, Selection("choice", probabilities, "num_candidates"), ("num_tokens", "num_candidates")
    )
    check(contract, torch.tensor([2, 4, 1, 3, 0]), torch.tensor([1, 1, 2, 3, 0]))
    results = results_of(contract)
    results["choice"][3] = results["choice"][3].roll(1)
    with pytest.raises(Violation, match="choice is not sorted by descending score"):
        judge(contract, CASE, "float32", "strict", results)


def with_ids_of_python(logits, *, count):
    """Decides where nobody sees it."""
    p = torch.softmax(logits, -1)
    ids = torch.tensor([sorted(range(CANDIDATES), key=row.__getitem__)[-count:][::-1] for row in p.tolist()])
    return p.gather(-1, ids), ids


def test_a_reference_in_which_nothing_was_replayed_is_an_error_of_the_contract():
    contract = contract_of(with_ids_of_python, Selection("choice", probabilities, "count"))
    with pytest.raises(ContractError, match="nothing in the reference could be replayed"):
        judge(contract, CASE, "float32", "strict", results_of(contract))


def test_a_replay_that_does_not_reach_the_output_is_an_error_of_the_contract():
    def fickle():
        fickle.calls += 1
        scores = torch.tensor([[1.0, 3.0, 2.0]])
        return {"choice": scores.topk(2).indices if fickle.calls == 1 else scores.argsort(descending=True)[:, :2]}

    fickle.calls = 0
    with pytest.raises(ContractError, match="the run took another way"):
        replay_of(fickle, "choice", torch.tensor([[0, 2]]))()


def test_another_decision_that_happens_to_be_equal_is_left_alone():
    """The best group is number 0, and so is the best expert."""

    def run():
        scores = torch.tensor([[4.0, 3.0, 1.0, 2.0]])
        group = scores.unflatten(1, (2, 2)).sum(2).argmax(1, keepdim=True)
        kept = torch.nn.functional.one_hot(group, 2).any(1).repeat_interleave(2, 1)
        ids = scores.masked_fill(~kept, -torch.inf).topk(1).indices
        return {"choice": ids, "group": group}

    replayed = replay_of(run, "choice", torch.tensor([[1]]))()
    assert replayed["choice"].item() == 1 and replayed["group"].item() == 0


def test_decisions_are_what_floating_numbers_become():
    with Decisions() as watched:
        scores = torch.tensor([0.5, 2.5])
        torch.arange(3) + scores.argmax()
        torch.zeros_like(scores, dtype=torch.int64)
        scores.to(torch.int32)
    assert [each.tolist() for each in watched.decided()] == [1, [0, 2]]


# ------------------------------------------------------------------------------------------------------------- helpers


def results_of(contract: Contract) -> dict[str, torch.Tensor]:
    """What the reference returns."""
    call = Call(make_inputs(contract, CASE, "float32"), options(contract, CASE))
    return call_torch(contract, contract.reference, call)


def check(contract: Contract, right: torch.Tensor, wrong: torch.Tensor | None) -> None:
    """Any choice of the first row, which ties, is right; the values are judged at it; a wrong one is rejected."""
    call = Call(make_inputs(contract, CASE, "float32"), options(contract, CASE))
    results = call_torch(contract, contract.reference, call)
    own = contract.reference(*(tensor.double() for tensor in call.inputs.values()), **call.options)[1][0]
    assert not torch.equal(own, right.to(own.dtype)), "the reference chose so itself"
    choice = results["choice"].to(torch.int64 if right.dtype == torch.int64 else torch.bool)
    choice[0] = right
    values = expected_values(call.inputs, choice)
    judge(contract, CASE, "float32", "strict", {"values": values, "choice": choice})
    off = values.clone()
    off.view(-1)[values[0].nonzero()[0] if values[0].ndim and values[0].any() else 0] += 2e-3
    with pytest.raises(Violation, match="values: "):
        judge(contract, CASE, "float32", "strict", {"values": off, "choice": choice})
    if wrong is not None:
        choice = choice.clone()
        choice[0 if wrong.ndim else 1] = wrong
        with pytest.raises(Violation, match="choice"):
            judge(contract, CASE, "float32", "strict", {"values": expected_values(call.inputs, choice), "choice": choice})


def expected_values(inputs: dict[str, torch.Tensor], choice: torch.Tensor) -> torch.Tensor:
    """Probabilities of what is chosen, 0 for nothing."""
    p = torch.softmax(inputs["logits"].double(), -1)
    if choice.dtype == torch.bool:
        return torch.where(choice, p, 0.0).float()
    ids = choice.reshape(len(choice), -1)
    values = torch.where(ids < 0, 0.0, p.gather(-1, ids.clamp(min=0)))
    return values.reshape(choice.shape).float()


assert math.isclose(sum([0.2] * CANDIDATES), 1.0)  # the flat share of a row, the threshold above
