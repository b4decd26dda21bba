"""How results are judged: values, form, and the words for what is wrong with them."""

import math
from dataclasses import replace

import jax
import pytest
import torch
from hypothesis import strategies as st

from gaugeblock.conformance.engine.budget.oracle import budgets, rounded_cotangents
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Recurrence, Regime
from gaugeblock.conformance.engine.frameworks import BadResult, Call, call_jax, call_torch
from gaugeblock.conformance.engine.inputs.cases import Case, cotangents, make_inputs, options
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.judging.diagnosis import diagnose
from gaugeblock.conformance.engine.judging.judge import Violation, check_form, judge, require_exact
from gaugeblock.conformance.engine.registry import find_contract


def results_of(contract: Contract, case: Case, dtype: str = "float32", function=None, *, gradients=False):
    """What the reference, or another function, returns for a case."""
    cotangent = rounded_cotangents(contract, case, dtype) if gradients else None
    call = Call(make_inputs(contract, case, dtype), options(contract, case), cotangent)
    return call_torch(contract, function or contract.reference, call)


def violation_of(contract: Contract, case: Case, results, dtype: str = "float32") -> Violation:
    with pytest.raises(Violation) as violation:
        check_form(contract, case, dtype, "cpu", results)
        judge(contract, case, dtype, "strict", results)
    return violation.value


# ----------------------------------------------------------------------------------------------------- values


def product(x: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ state["weight"].to(wide)).to(x.dtype)


def normal(draw: Draw, parameters) -> dict[str, torch.Tensor]:
    rows, inner, columns = (parameters[name] for name in ("rows", "inner", "columns"))
    return {"x": draw.normal(rows, inner), "state/weight": draw.normal(inner, columns) * inner**-0.5}


def special(draw: Draw, parameters) -> dict[str, torch.Tensor]:
    made = normal(draw, parameters)
    made["x"][1] = math.nan
    made["x"][2, 0] = math.inf
    return made


def integers(draw: Draw, parameters) -> dict[str, torch.Tensor]:
    return {key: (3 * each).round() for key, each in normal(draw, parameters).items()}


SIZES = {"rows": 48, "inner": 32, "columns": 64}
PRODUCT = Contract(
    name="toy.product",
    summary="A product with the matrix of a state dict.",
    formula="y = x @ weight",
    source="none",
    reference=product,
    twin="none",
    inputs=(
        Input("x", ("rows", "inner"), differentiable=True),
        Input("state", differentiable=True, leaves=lambda sizes: {"weight": Input("weight", ("inner", "columns"))}),
    ),
    outputs=(Output("y", ("rows", "columns"), differentiable=True),),
    options=(),
    batch="rows",
    parameters=lambda: st.just(SIZES),
    landmarks=(SIZES,),
    regimes=(
        Regime("normal", normal),
        Regime("special", special, "worst element"),
        Regime("integers", integers, "exact"),
    ),
    flops=lambda parameters: 0.0,
    workloads=(),
)
NORMAL = Case(**SIZES, regime="normal", seed=4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_right_result_passes_with_its_gradients(dtype):
    errors = judge(PRODUCT, NORMAL, dtype, "strict", results_of(PRODUCT, NORMAL, dtype, gradients=True))
    assert [*errors] == ["y", "gradient of x", "gradient of state/weight"]
    assert all(each.statistics().worst <= 1 for each in errors.values())


def test_no_gradient_of_a_buffer_is_asked_for():
    tensors, state = dict.fromkeys(["x", "state/weight"], torch.zeros(1)), PRODUCT.inputs[1]
    with_buffer = replace(PRODUCT, inputs=(PRODUCT.inputs[0], replace(state, buffers=frozenset({"weight"}))))
    assert PRODUCT.differentiable(tensors) == ["x", "state/weight"] and with_buffer.differentiable(tensors) == ["x"]


def test_one_wrong_element_shows_in_max_and_is_named():
    results = results_of(PRODUCT, NORMAL)
    results["y"][3, 5] += 0.01
    violation = violation_of(PRODUCT, NORMAL, results)
    assert violation.message.startswith("y: an element lies ") and "its error budget" in violation.message
    assert violation.diagnosis == "1 of 3072 elements: rows 3; columns 5"
    assert violation.details[0].startswith(f"worst element y[3, 5] = {results['y'][3, 5]:.9g}, oracle ")
    assert violation.details[1].endswith("3072 elements")


def test_errors_too_large_everywhere_show_in_rms():
    budget = budgets(PRODUCT, NORMAL, "float32", "strict")["y"]
    noise = math.sqrt(3) * (2 * Draw(0).uniform(*budget.value.shape) - 1)
    results = {"y": (budget.value + 2.5 * budget.variance.sqrt() * noise).to(torch.float32)}
    violation = violation_of(PRODUCT, NORMAL, results)
    assert violation.message.startswith("y: rms error ") and "precision is lost everywhere" in violation.message
    assert violation.diagnosis == "no single element is beyond its budget: the error is spread"


def test_errors_of_one_sign_show_in_bias():
    budget = budgets(PRODUCT, NORMAL, "float32", "strict")["y"]
    results = {"y": (budget.value - 0.7 * budget.variance.sqrt() * budget.value.sign()).to(torch.float32)}
    violation = violation_of(PRODUCT, NORMAL, results)
    assert violation.message.startswith("y: bias ") and "errors have one sign" in violation.message
    assert violation.diagnosis.endswith(", too small in magnitude")


def test_a_truncated_result_is_wrong():
    wide = {key: each.float() for key, each in make_inputs(PRODUCT, NORMAL, "bfloat16").items()}
    exact = product(wide["x"], {"weight": wide["state/weight"]})
    judge(PRODUCT, NORMAL, "bfloat16", "strict", {"y": exact.to(torch.bfloat16)})
    truncated = (exact.view(torch.int32) & -(2**16)).view(torch.float32).to(torch.bfloat16)
    assert violation_of(PRODUCT, NORMAL, {"y": truncated}, "bfloat16").message.startswith("y: an element lies ")


def test_a_wrong_gradient_is_told_from_a_right_output():
    results = results_of(PRODUCT, NORMAL, gradients=True)
    results["gradient of state/weight"][:, -1] = 0
    violation = violation_of(PRODUCT, NORMAL, results)
    assert violation.message.startswith("gradient of state/weight: ")
    assert "columns 63 (the last one)" in violation.diagnosis


@pytest.mark.parametrize(
    ("place", "value"),
    [((1, 0), 0.0), ((0, 0), math.nan), ((0, 0), math.inf), ((2, 0), math.nan)],
    ids=["NaN lost", "NaN invented", "infinity invented", "infinity to NaN"],
)
def test_nan_and_infinity_must_stand_where_the_oracle_has_them(place, value):
    case = NORMAL.replace(regime="special")
    results = results_of(PRODUCT, case)
    judge(PRODUCT, case, "float32", "strict", results)
    results["y"][place] = value
    assert "infinitely far beyond" in violation_of(PRODUCT, case, results).message


def test_an_exact_regime_allows_no_error_at_all():
    case = NORMAL.replace(regime="integers")
    results = results_of(PRODUCT, case)
    assert judge(PRODUCT, case, "float32", "strict", results)["y"].statistics().worst == 0
    results["y"][0, 0] += 2.0**-10
    violation = violation_of(PRODUCT, case, results)
    assert violation.message.startswith("y: 1 of 3072 elements are not exact")
    assert violation.details[0].startswith("y[0, 0] = ")


def test_exact_results_may_hold_nan_and_zeros_of_either_sign():
    require_exact("y", torch.tensor([math.nan, 0.0, math.inf]), torch.tensor([math.nan, -0.0, math.inf]))
    with pytest.raises(Violation, match="1 of 3 elements"):
        require_exact("y", torch.tensor([math.nan, 0.0, math.inf]), torch.tensor([math.nan, 0.0, -math.inf]))


def test_elements_of_an_empty_batch_are_all_right():
    case = NORMAL.replace(rows=0)
    judge(PRODUCT, case, "float32", "strict", results_of(PRODUCT, case, gradients=True))


# ------------------------------------------------------------------------------------------------------- form


ROUTER = find_contract("routers.softmax_topk")
ROUTED = Case(num_tokens=5, num_experts=8, top_k=3, renormalize=True, regime="dithered")
GRADIENT = "gradient of router_logits"


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "topk_weights",
            lambda each: each[1:],
            "topk_weights has shape (4, 3), expected (5, 3) = [num_tokens, top_k]",
        ),
        ("topk_weights", torch.Tensor.double, "topk_weights is torch.float64, expected torch.float32"),
        ("topk_ids", torch.Tensor.float, "topk_ids is torch.float32, expected an integer dtype"),
        ("topk_ids", torch.Tensor.bool, "topk_ids is torch.bool, expected an integer dtype"),
        ("topk_ids", lambda each: each.to("meta"), "topk_ids is on meta, expected cpu"),
        (GRADIENT, torch.Tensor.half, f"{GRADIENT} is torch.float16, expected torch.float32"),
        (GRADIENT, lambda each: each[1:], f"{GRADIENT} has shape (4, 8), expected (5, 8)"),
    ],
)
def test_results_must_have_the_form_of_the_contract(key, change, message):
    results = results_of(ROUTER, ROUTED, gradients=True)
    assert violation_of(ROUTER, ROUTED, results | {key: change(results[key])}).message == message


def test_outputs_are_due_in_the_dtype_under_test():
    results = results_of(PRODUCT, NORMAL, "bfloat16")
    check_form(PRODUCT, NORMAL, "bfloat16", "cpu", results)
    with pytest.raises(Violation, match=r"y is torch\.bfloat16, expected torch\.float16"):
        check_form(PRODUCT, NORMAL, "float16", "cpu", results)


def detached_weight(x, state):
    return product(x, {"weight": state["weight"].detach()})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, state: (product(x, state), 1), "returned 2 values, expected 1: (y)"),
        (lambda x, state: None, "y is a NoneType, expected a torch.Tensor"),
        (lambda x, state: product(x, state).detach().numpy(), "y is a ndarray, expected a torch.Tensor"),
        (
            lambda x, state: product(x, state).detach(),
            "y has no gradient function, so no gradient reaches x, state/weight",
        ),
        (detached_weight, "state/weight gets no gradient"),
        (lambda x, state: product(x, state)[:1], "y has shape (1, 64), expected (48, 64)"),
    ],
)
def test_what_is_no_result_is_named(function, message):
    with pytest.raises(BadResult) as error:
        results_of(PRODUCT, NORMAL, function=function, gradients=True)
    assert str(error.value) == message


STEPS = replace(
    PRODUCT,
    name="tests.steps",
    inputs=(Input("x", ("rows", "inner")), Input("state", leaves=lambda parameters: {"w": Input("w", ("inner",))})),
    outputs=(Output("new_state", leaves=lambda parameters: {"w": Input("w", ("inner",))}), Output("y", ("rows", "inner"))),
    recurrence=Recurrence(steps="rows", carried={"state": "new_state"}),
)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, state: (state, {f"at {x[0]:.0f}": x}), "step 1 lacks y/at 0, other than the first"),
        (lambda x, state: (state, 1.0), "of a step, a result is a float, expected a torch.Tensor"),
        (lambda x, state: ({}, x), "step 0 lacks new_state, other than the first"),
        (lambda x, state: (state, x[: 2 + int(x[0])]), "of one result, steps return shapes and dtypes "),
    ],
)
def test_steps_that_return_no_results_are_named(function, message):
    with pytest.raises(BadResult) as error:
        call_torch(STEPS, function, Call({"x": torch.arange(2.0)[:, None].expand(2, 4), "state/w": torch.ones(4)}, {}, None))
    assert str(error.value).startswith(message)


def test_what_jax_returns_of_all_steps_must_lie_on_the_same_devices():
    devices, call = jax.devices(), Call({"x": torch.arange(2.0)[:, None].expand(2, 4), "state/w": torch.ones(4)}, {}, None)
    with pytest.raises(BadResult, match=r"^one result of all steps cannot be stacked: .* incompatible devices"):
        call_jax(STEPS, lambda x, state: (state, jax.device_put(x, devices[int(x[0])])), call)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_jax_function_must_return_as_many_jax_arrays(gradients):
    cotangent = cotangents(PRODUCT, NORMAL) if gradients else None
    call = Call(make_inputs(PRODUCT, NORMAL, "float32"), {}, cotangent)
    with pytest.raises(BadResult, match="returned 2 values, expected 1"):
        call_jax(PRODUCT, lambda x, state: (x, x), call)
    with pytest.raises(BadResult, match="y is a float, expected a jax"):
        call_jax(PRODUCT, lambda x, state: 1.0, call)


def test_jax_functions_are_judged_like_others():
    call = Call(make_inputs(PRODUCT, NORMAL, "float32"), {}, cotangents(PRODUCT, NORMAL))
    right = call_jax(PRODUCT, lambda x, state: jax.numpy.dot(x, state["weight"], precision="highest"), call)
    judge(PRODUCT, NORMAL, "float32", "strict", right)
    wrong = call_jax(PRODUCT, lambda x, state: 1.001 * jax.numpy.dot(x, state["weight"]), call)
    assert "y: " in violation_of(PRODUCT, NORMAL, wrong).message


# -------------------------------------------------------------------------------------------------- diagnosis


def wrong_at(shape: tuple[int, ...], *index) -> torch.Tensor:
    wrong = torch.zeros(shape, dtype=torch.bool)
    wrong[index] = True
    return wrong


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (wrong_at((48, 8), slice(16, 32)), "128 of 384 elements: rows 16-31"),
        (wrong_at((48, 8), slice(16, 32), [0, 3]), "32 of 384 elements: rows 16-31; columns 0, 3"),
        (wrong_at((70, 8), slice(64, None)), "48 of 560 elements: rows 64-69 (the last, partial tile of 64)"),
        (wrong_at((33, 8), 32), "8 of 264 elements: rows 32 (the last one)"),
        (wrong_at((33, 8), slice(30, None)), "24 of 264 elements: rows 30-32 (the last 3)"),
        (wrong_at((64, 8), slice(0, None, 2)), "256 of 512 elements: rows 0, 2, 4, 6, ... (32 of 64)"),
        (wrong_at((3, 4, 5), slice(None), 2), "15 of 60 elements: positions along axis 1 2"),
        (wrong_at((9,), [1, 4]), "2 of 9 elements: rows 1, 4"),
        (torch.eye(4, dtype=torch.bool), "4 of 16 elements, scattered over all rows and columns"),
        (torch.ones(4, 4, dtype=torch.bool), "every element"),
        (torch.zeros(4, 4, dtype=torch.bool), "no single element is beyond its budget: the error is spread"),
    ],
)
def test_the_pattern_of_wrong_elements_is_named(wrong, text):
    assert diagnose(wrong, None) == text


def test_errors_of_one_sign_are_told():
    every = torch.ones(4, 4, dtype=torch.bool)
    assert diagnose(every, -torch.ones(4, 4)) == "every element, too small in magnitude"
    assert diagnose(~every, torch.ones(4, 4)).endswith("the error is spread, too large in magnitude")
    assert diagnose(every, torch.tensor([1.0, -1.0]).repeat(4, 2)) == "every element"


# ---------------------------------------------------------------------------------------------------- caching


def test_contracts_of_one_name_have_their_own_oracles():
    doubled = replace(PRODUCT, reference=lambda x, state: 2 * product(x, state))
    judge(PRODUCT, NORMAL, "float32", "strict", results_of(PRODUCT, NORMAL))
    judge(doubled, NORMAL, "float32", "strict", results_of(doubled, NORMAL))
