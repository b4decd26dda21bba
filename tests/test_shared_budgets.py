"""Budgets that two workers need are computed by one."""

import pytest
import torch

from gaugeblock.conformance import gate
from gaugeblock.conformance.engine.budget import oracle, shared
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.inputs.coverage import landmarks
from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.conformance.engine.trial import Subject

SWIGLU = "gated_activations.swiglu"


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(shared, "_store", {})
    monkeypatch.setattr(shared, "_contracts", (SWIGLU,))
    return shared._store


@pytest.mark.parametrize("name", [SWIGLU, "gated_activations.geglu"])
def test_another_worker_finds_what_one_has_computed(name, store, monkeypatch):
    arguments = find_contract(name), landmarks(find_contract(name))[0], "bfloat16", "strict"
    oracle._budgets.cache_clear()
    first = oracle.budgets(*arguments, gradients=True)
    oracle._budgets.cache_clear()  # as in a process of its own
    computed = []
    monkeypatch.setattr(oracle, "_computed", lambda *key, **options: computed.append(key) or {})
    again = oracle.budgets(*arguments, gradients=True)
    oracle._budgets.cache_clear()
    if name != SWIGLU:
        assert computed and not store
        return
    assert not computed and len(store) == 1 and again.keys() == first.keys()
    for key, budget in first.items():
        assert torch.equal(again[key].value, budget.value) and torch.equal(again[key].variance, budget.variance)


def test_a_budget_is_told_by_all_that_it_depends_on(store):
    key = [landmarks(find_contract(SWIGLU))[0], "bfloat16", "strict", None, True]
    changes = [key[0].replace(seed=7), "float16", "eager", 1, False]
    others = [[*key[:place], other, *key[place + 1 :]] for place, other in enumerate(changes)]
    found = [shared.once(SWIGLU, tuple(each), lambda place=place: place) for place, each in enumerate([key, *others])]
    assert found == list(range(len(others) + 1))


def test_contracts_that_two_workers_judge():
    def subject(contract, world_sizes=()):
        return Subject(Implementation(contract, "some", abs, world_sizes=world_sizes), "float32", "cpu"), None

    subjects = [subject("a"), subject("b"), subject("b", (1, 2)), subject("c", (2,))]
    tasks = {"a": [(0, "parity")], "b": [(1, "parity"), (1, "layout")], "ranks": [(2, "parity"), (3, "parity")]}
    assert gate._in_two_groups(tasks, subjects) == {"b"}
    with gate._store(frozenset()) as none:
        assert none == {}
