"""DiT whose attention takes delta from its result: the same function, and what its rounding is allowed."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from gaugeblock.conformance.engine.budget.error_budget import Budget
from gaugeblock.conformance.engine.budget.oracle import budgets, exact_inputs, reference_run, rounded_cotangents
from gaugeblock.conformance.engine.inputs.cases import Case, options
from gaugeblock.conformance.engine.judging.judge import Violation, judge
from gaugeblock.conformance.engine.registry import contracts, find_contract
from gaugeblock.conformance.engine.trial import Trial
from gaugeblock.conformance.selftest.variant import variants

DIT = find_contract("dit.dit")
WITHOUT = replace(DIT, rounded_as=None)
CASE = Case(**DIT.landmarks[0], regime="dithered")
WIDTH = CASE.parameters["hidden_size"]
QKV_BIAS = "gradient of state/blocks.0.attn.qkv.bias"


@pytest.mark.parametrize("landmark", DIT.landmarks)
def test_it_is_the_same_function_with_the_same_gradients(landmark):
    case = Case(**landmark, regime="dithered")
    inputs, opts = exact_inputs(DIT, case, "float32"), options(DIT, case)
    cotangents = {key: each.double() for key, each in rounded_cotangents(DIT, case, "float32").items()}
    expected = reference_run(DIT, inputs, opts, cotangents)
    for key, tensor in reference_run(DIT, inputs, opts, cotangents, DIT.rounded_as).items():
        # float64's rounding, a million times: gradients cancel, that of the keys' bias to 0
        torch.testing.assert_close(tensor, expected[key], rtol=1e-10, atol=1e-10 * float(expected[key].abs().max()) + 1e-13)


def keys(budget: Budget) -> float:
    """The budget's deviation for the gradient of the keys' bias, which is 0."""
    assert budget.value[WIDTH : 2 * WIDTH].abs().max() < 1e-12
    return float(budget.variance[WIDTH : 2 * WIDTH].mean().sqrt())


def test_the_budget_grows_where_delta_has_an_error_and_nowhere_else():
    flash, plain = (
        [budgets(each, CASE.replace(seed=seed), "bfloat16", "eager", gradients=True) for seed in range(6)]
        for each in (DIT, WITHOUT)
    )
    for one, other in zip(flash, plain, strict=True):
        assert keys(one[QKV_BIAS]) > 2 * keys(other[QKV_BIAS])
    # an estimate by 12 runs of errors that the elements share has a deviation of 0.4 of itself; of six, 0.17
    for key in ("out", "gradient of state/blocks.0.attn.proj.weight", "gradient of state/x_embedder.proj.weight"):
        one, other = (statistics.mean(float(each[key].variance.mean()) for each in several) for several in (flash, plain))
        assert one < 1.5 * other


@pytest.mark.parametrize("rounding", ["strict", "eager"])
@pytest.mark.parametrize(
    "name", [each.name for each in contracts().values() if each.rounded_as and each.regimes[0].differentiable]
)
def test_a_budget_found_by_it_is_nowhere_less_than_without(name, rounding):
    """In the mean over an output's elements.

    Of a single element two estimates by 12 runs differ by 0.3 (the deviation of the logarithm of their quotient): that of a
    scalar parameter lies between -0.65 and 0.34 in ten seeds, -0.02 in the mean of these. So one number has a wider bound.
    """
    contract = contracts()[name]
    case = Case(**contract.landmarks[-1], regime="dithered")
    flash, plain = (
        budgets(each, case, "bfloat16", rounding, gradients=True) for each in (contract, replace(contract, rounded_as=None))
    )
    ratios = {}
    for key, budget in plain.items():
        there = budget.variance > 0
        assert (flash[key].variance[there] > 0).all()
        if there.any():
            ratios[key] = float((flash[key].variance[there] / budget.variance[there]).log().mean()) / 2
    assert min(each for key, each in ratios.items() if plain[key].value.numel() > 1) > -0.5
    assert min(ratios.values()) > -1 and statistics.mean(ratios.values()) > -0.1


@pytest.mark.parametrize("name", ["flash-attention", "attention-of-torch"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flash_kernels_conform(name, dtype):
    variant = next(each for each in variants() if each.contract == DIT.name and each.name == name)
    subject = next(each for each in variant.subjects() if each.dtype == dtype)
    for seed in range(2):
        case = CASE.replace(seed=seed)
        judge(DIT, case, dtype, "eager", Trial(subject, case).run(gradients=True))


def test_without_it_its_errors_come_near_the_limit_or_beyond():
    variant = next(each for each in variants() if each.contract == DIT.name and each.name == "flash-attention")
    largest = {DIT: 0.0, WITHOUT: 0.0}
    for subject in (each for each in variant.subjects() if each.dtype in ("float16", "bfloat16")):
        for seed in range(6):
            case = CASE.replace(seed=seed)
            results = Trial(subject, case).run(gradients=True)
            for contract in largest:
                try:
                    errors = judge(contract, case, subject.dtype, "eager", results).values()
                except Violation:
                    largest[contract] = math.inf
                else:
                    largest[contract] = max(largest[contract], *(each.statistics().worst for each in errors))
    assert largest[DIT] < 0.75 and largest[WITHOUT] > 0.85  # measured: 0.6, and a root mean square 1.3 times its limit
