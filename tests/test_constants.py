"""Constants that float32 does not hold: options are rounded for all, and what is computed from them is rounded by everyone."""

from dataclasses import replace

import pytest
import torch

from gaugeblock.conformance.contracts.train_image_diffusion import USUAL, sizes
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime
from gaugeblock.conformance.engine.frameworks import Call, call_torch
from gaugeblock.conformance.engine.inputs.cases import Case, in_float32, make_inputs, options
from gaugeblock.conformance.engine.judging.judge import Violation, judge
from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.reference.configs import DiTConfig, ImageDiffusionConfig

STEP = find_contract("train_image_diffusion.train_step")


def test_options_are_numbers_of_float32_also_inside_configs():
    config = in_float32(ImageDiffusionConfig(DiTConfig(norm_eps=1e-5, learn_sigma=False), beta2=0.999))
    for value in (config.beta2, config.model.norm_eps, config.learning_rate, in_float32(0.1)):
        assert torch.tensor(value, dtype=torch.float32).item() == value
    assert abs(config.beta2 - 0.999) < 3e-8 and config.seed == 0 and config.velocity == "noise - data"
    assert in_float32(True) is True and in_float32(3) == 3 and in_float32("x") == "x" and in_float32(0.25) == 0.25


def test_the_call_gets_them():
    config = options(STEP, Case(**sizes(1, 2, **USUAL), regime="fresh"))["config"]
    assert config.beta1 == torch.tensor(0.9).item() != 0.9


@pytest.mark.parametrize("regime", [each.name for each in STEP.regimes])
def test_a_right_training_step_conforms_with_what_people_train_with(regime):
    for seed in range(2):
        case = Case(**sizes(1, 4, **USUAL), regime=regime, seed=seed)
        call = Call(make_inputs(STEP, case, "float32"), options(STEP, case))
        judge(STEP, case, "float32", "strict", call_torch(STEP, STEP.reference, call))


@pytest.mark.parametrize("change", [{"beta1": 0.9001}, {"beta2": 0.9985}, {"adam_epsilon": 1e-4}, {"weight_decay": 0.02}])
def test_other_constants_do_not(change):
    case = Case(**sizes(1, 4, **USUAL), regime="under way")
    given = options(STEP, case)
    call = Call(make_inputs(STEP, case, "float32"), {"config": replace(given["config"], **change)})
    with pytest.raises(Violation):
        judge(STEP, case, "float32", "strict", call_torch(STEP, STEP.reference, call))


def scaled_by(factor):
    def scale(x):
        return x * factor

    return scale


def scaling(factor: float) -> Contract:
    """One product with a constant, of many elements."""
    return replace(
        find_contract("routers.softmax_topk"),
        name=f"scaling.by_{round(1e6 * factor)}_millionths",
        reference=scaled_by(factor),
        inputs=(Input("x", ("num_tokens",)),),
        outputs=(Output("y", ("num_tokens",), dtype="float32"),),
        options=(),
        regimes=(Regime("dithered", lambda draw, parameters: {"x": draw.normal(parameters["num_tokens"])}),),
        formulas=(),
        selection=None,
    )


@pytest.mark.parametrize("factor", [0.999999, 1 / 3, 0.1])
def test_a_constant_may_be_rounded_once_and_no_more(factor):
    contract, case = scaling(factor), Case(num_tokens=5000, regime="dithered")
    x = make_inputs(contract, case, "float32")["x"]
    right = torch.tensor(factor, dtype=torch.float32)
    judge(contract, case, "float32", "strict", {"y": x * right})
    with pytest.raises(Violation, match="times its limit"):
        judge(contract, case, "float32", "strict", {"y": x * (right * (1 + 2**-21))})
