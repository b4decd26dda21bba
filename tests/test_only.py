"""The claim `only`: which sizes and options a candidate takes, read and never run."""

import pytest
from hypothesis import given, settings

from gaugeblock.conformance import implements
from gaugeblock.conformance.engine import registry
from gaugeblock.conformance.engine.exploration import PROFILES, examine
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.inputs.cases import free_parameters
from gaugeblock.conformance.engine.inputs.coverage import array
from gaugeblock.conformance.engine.only import holds, narrowed, wrong_with
from gaugeblock.conformance.engine.properties import find_property
from gaugeblock.conformance.engine.registry import RegistrationError, find_contract
from gaugeblock.conformance.engine.trial import Subject
from gaugeblock.reference.torch.experts import fused_swiglu

EXPERTS = find_contract("experts.fused_swiglu")
ALIGNED = "hidden_size % 8 == 0 and intermediate_size % 8 == 0"


@pytest.mark.parametrize(
    "only, expected",
    [
        ("a % 8 == 0", True),
        ("a // b >= 6 and not b > 5", False),
        ("a - b != 13 or c == 'random'", True),
        ("a + b <= 18", False),
        ("flag", True),
        ("a % zero == 0", False),  # has no value
        ("c < 3", False),
    ],
)
def test_an_expression_has_its_value(only, expected):
    assert holds(only, {"a": 16, "b": 3, "c": "random", "flag": True, "zero": 0}) is expected


@pytest.mark.parametrize(
    "only, wrong",
    [
        ("hiden_size > 8", "unknown name 'hiden_size'; did you mean 'hidden_size'?"),
        ("__import__('os').system('true')", "is more than names"),
        ("hidden_size ** 99999999 > 1", "is more than names"),
        ("'%99999999d' % top_k == ''", "is more than names"),
        ("hidden_size * 99999 > 1", "is more than names"),
        ("8 < hidden_size < 64", "is more than names"),
        ("top_k <=", "expected an expression such as"),
        ("(" * 199, "expected an expression such as"),
        ("top_k > 0 and " * 20 + "top_k > 0", "expected text of at most 200 characters"),
        (8, "expected text of at most 200 characters"),
        ("top_k > 1000", "none of the contract's landmarks is such"),
    ],
)
def test_what_is_no_expression_of_sizes_is_refused(only, wrong):
    assert wrong in wrong_with(only, EXPERTS)
    with pytest.raises(RegistrationError, match="only="):
        implements(EXPERTS.name, name="odd", only=only)(fused_swiglu)


def test_only_such_cases_are_drawn():
    contract = narrowed(EXPERTS, ALIGNED)
    cases = array(contract, 2)
    assert len(contract.landmarks) > 2 and len(cases) > len(contract.landmarks)
    assert all(holds(ALIGNED, case.parameters) for case in cases)
    assert any(not holds(ALIGNED, case.parameters) for case in array(EXPERTS, 2))


@given(free_parameters(narrowed(EXPERTS, ALIGNED)))
@settings(max_examples=20, deadline=None)
def test_nor_are_others_found_by_chance(parameters):
    assert holds(ALIGNED, parameters)


def test_a_candidate_is_judged_where_it_says_and_the_report_says_where(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})

    def picky(hidden_states, w13, w2, topk_weights, topk_ids):
        if hidden_states.shape[1] % 8 or w2.shape[2] % 8:
            raise RuntimeError("rows must be multiples of 16 bytes")
        return fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)

    for only, status in (("", "fail"), (ALIGNED, "pass")):
        subject = Subject(Implementation(EXPERTS.name, "picky", picky, only=only), "float32", "cpu")
        verdict = examine(subject, find_property("determinism"), PROFILES["quick"])
        assert verdict.status == status, verdict.reason
    assert verdict.coverage and verdict.coverage.of == f"pairs where {ALIGNED}"
