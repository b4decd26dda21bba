"""DiT whose attention takes delta from its result: the same function, and what its rounding is allowed."""

from dataclasses import replace

import pytest
import torch

from gaugeblock.conformance.engine.budget.error_budget import Budget
from gaugeblock.conformance.engine.budget.oracle import budgets, exact_inputs, reference_run, rounded_cotangents
from gaugeblock.conformance.engine.inputs.cases import Case, options
from gaugeblock.conformance.engine.judging.judge import Violation, judge
from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.conformance.engine.trial import Trial
from gaugeblock.conformance.selftest.variant import variants

DIT = find_contract("dit.dit")
WITHOUT = replace(DIT, formulas=())
CASE = Case(**DIT.landmarks[0], regime="dithered")
WIDTH = CASE.parameters["hidden_size"]
QKV_BIAS = "gradient of state/blocks.0.attn.qkv.bias"


@pytest.mark.parametrize("landmark", DIT.landmarks)
def test_it_is_the_same_function_with_the_same_gradients(landmark):
    case = Case(**landmark, regime="dithered")
    inputs, opts = exact_inputs(DIT, case, "float32"), options(DIT, case)
    cotangents = {key: each.double() for key, each in rounded_cotangents(DIT, case, "float32").items()}
    expected = reference_run(DIT, inputs, opts, cotangents)
    for key, tensor in reference_run(DIT, inputs, opts, cotangents, *DIT.formulas).items():
        # float64's rounding, a million times: gradients cancel, that of the keys' bias to 0
        torch.testing.assert_close(tensor, expected[key], rtol=1e-10, atol=1e-10 * float(expected[key].abs().max()) + 1e-13)


def keys(budget: Budget) -> float:
    """The budget's deviation for the gradient of the keys' bias, which is 0."""
    assert budget.value[WIDTH : 2 * WIDTH].abs().max() < 1e-12
    return float(budget.variance[WIDTH : 2 * WIDTH].mean().sqrt())


def test_the_budget_grows_where_delta_has_an_error_and_nowhere_else():
    both, one = (budgets(each, CASE, "bfloat16", "eager", gradients=True) for each in (DIT, WITHOUT))
    assert keys(both[QKV_BIAS]) > 2 * keys(one[QKV_BIAS])
    for key in ("out", "gradient of state/blocks.0.attn.proj.weight", "gradient of state/x_embedder.proj.weight"):
        assert both[key].variance.mean() < 1.5 * one[key].variance.mean()


@pytest.mark.parametrize("name", ["flash-attention", "attention-of-torch"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flash_kernels_conform(name, dtype):
    variant = next(each for each in variants() if each.contract == DIT.name and each.name == name)
    subject = next(each for each in variant.subjects() if each.dtype == dtype)
    for seed in range(2):
        case = CASE.replace(seed=seed)
        judge(DIT, case, dtype, "eager", Trial(subject, case).run(gradients=True))


def test_without_the_formula_one_does_not():
    """Its gradient of the keys' bias lies 1.7 budgets from 0."""
    variant = next(each for each in variants() if each.contract == DIT.name and each.name == "flash-attention")
    subject = next(each for each in variant.subjects() if each.dtype == "float16")
    with pytest.raises(Violation, match=r"attn.qkv.bias: an element lies 1\.\d+ times its error budget"):
        for regime in ("dithered", "constants", "adversarial"):
            for seed in range(2):
                case = CASE.replace(regime=regime, seed=seed)
                judge(WITHOUT, case, "float16", "eager", Trial(subject, case).run(gradients=True))
