"""The constants of the error budget, measured again on real roundings; and no alarm for what is right."""

import functools
import os

import pytest
import torch

from gaugeblock.conformance.engine.budget.error_budget import BIAS_LIMIT, KAPPA, NOISE_RUNS, RMS_LIMIT, Errors, measure, spread
from gaugeblock.conformance.engine.budget.oracle import exact_inputs, noisy_runs, reference_run
from gaugeblock.conformance.engine.budget.rounding_noise import ROUNDING_VARIANCE, RoundingNoise, rounding_unit
from gaugeblock.conformance.engine.budget.runs import of_run
from gaugeblock.conformance.engine.exploration import check
from gaugeblock.conformance.engine.inputs.cases import Case, options
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import contracts, find_contract
from gaugeblock.conformance.engine.trial import Ledger
from gaugeblock.conformance.selftest.fault import faults
from gaugeblock.conformance.selftest.rates import drawn_cases, judge_variants, landmark_cases

LOW_PRECISION = ("float16", "bfloat16")
DTYPES = ("float32", *LOW_PRECISION)
# Cases for each contract, regime and dtype; 24 of them make about 10,000 judgements, which take some minutes.
CASES = int(os.environ.get("GAUGEBLOCK_VARIANT_CASES", "1"))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def noise_of(function, dtype: str, rounding: str, runs: int = 24, **options) -> torch.Tensor:
    """The predicted deviation of a function's result, element by element."""
    errors = []
    for seed in range(runs):
        with RoundingNoise(dtype, rounding, seed, **options):
            noisy = function()
        errors.append(noisy - function())
    return torch.stack(errors).square().mean(0).sqrt()


# ------------------------------------------------------------------------------------------------------- the constants


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_variance_of_a_rounding(dtype: str) -> None:
    values = torch.exp2(torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 8 - 4)
    errors = values.to(getattr(torch, dtype)).double() / values - 1
    assert errors.square().mean() / rounding_unit(dtype) ** 2 == pytest.approx(ROUNDING_VARIANCE, rel=0.02)
    assert errors.abs().max() <= rounding_unit(dtype)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("depth", (16, 100, 512))
def test_matrix_product_of_rounded_operands(dtype: str, depth: int) -> None:
    left, right, low = draw(64, depth), draw(depth, 48, seed=1), getattr(torch, dtype)
    true_error = left.to(low).double() @ right.to(low).double() - left @ right
    predicted = noise_of(lambda: left @ right, dtype, "strict")
    assert (true_error / predicted).square().mean().sqrt() == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_chain_of_operations_rounded_one_by_one(dtype: str) -> None:
    low = getattr(torch, dtype)
    gate, up = draw(256, 64).to(low), draw(256, 64, seed=1).to(low)
    true_error = (torch.nn.functional.silu(gate) * up).double() - torch.nn.functional.silu(gate.double()) * up.double()
    predicted = noise_of(lambda: torch.nn.functional.silu(gate.double()) * up.double(), dtype, "eager")
    assert (true_error / predicted)[predicted > 0].square().mean().sqrt() == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("terms", (64, 1024))
def test_sum_in_float32_one_after_the_other(terms: int) -> None:
    """What is predicted is the unluckiest order of a thousand, 2.6 times an ordinary one."""
    values = draw(512, terms).float().double()
    true_error = functools.reduce(torch.add, values.float().unbind(1)).double() - values.sum(1)
    predicted = noise_of(lambda: values.sum(1), "float32", "strict")
    ratio = (true_error / predicted).square().mean().sqrt()
    assert 0.25 < ratio < 0.75
    assert (true_error / predicted).abs().max() < KAPPA / 2


@pytest.mark.parametrize("cancelling", (False, True))
def test_a_product_that_begins_with_its_bias(cancelling: bool) -> None:
    """As torch's convolution of one example does: each partial sum is rounded at the size of the bias, not of the products."""
    left, right, bias = (2**-12 * draw(256, 16)).float().double(), draw(16, 16, seed=1).float().double(), -torch.ones(16)
    products = (left[:, :, None] * right).float().unbind(1)
    true_error = functools.reduce(torch.add, products, bias.float()).double() - (left @ right + bias)
    for product in (lambda: left @ right + bias, lambda: (left.view(2, 128, 16) @ right + bias).flatten(0, 1)):
        predicted = noise_of(product, "float32", "strict", cancelling=cancelling)
        assert 0.5 < (true_error / predicted).square().mean().sqrt() < 1.5


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("runs", (None, 3))
def test_the_first_run_rounds_in_earnest(dtype: str, runs: int | None) -> None:
    """What is small beside a 1 is lost in every implementation; noise beside it would leave some."""
    low = getattr(torch, dtype)
    small, factor = (2**-11 * draw(64)).to(low), draw(64, seed=1).to(low)
    with RoundingNoise(dtype, "eager", 0, runs=runs, first_rounds=True):
        noisy = ((small.double() * factor.double() + 1) / 3 - 0.1) * 0.7
    expected = ((small * factor + 1) / 3 - 0.1) * 0.7
    assert torch.equal(of_run(0, noisy), expected.double())
    assert runs is None or not torch.equal(of_run(1, noisy), expected.double())


def test_a_first_run_that_is_no_number_does_not_count() -> None:
    value, runs = draw(8, 4), draw(12, 8, 4, seed=1)
    broken = runs.clone()
    broken[0, 0, 0] = torch.nan
    runs[0, 0, 0] = value[0, 0]
    assert torch.equal(spread({"y": value}, {"y": broken})["y"].variance, spread({"y": value}, {"y": runs})["y"].variance)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("at_once", (None, 3))
def test_what_depends_on_fixed_float32_alone_stays_in_it(dtype: str, at_once: int | None) -> None:
    """Times and tables of waves are computed in float32 by all code; they are rounded once, where the dtype's tensors are met."""
    times, tokens = draw(64).abs(), draw(64, seed=1)

    def deviation(wide: tuple[torch.Tensor, ...], meets: bool) -> float:
        """Of the waves of times, relative to them."""
        with RoundingNoise(dtype, "eager", 0, wide=wide, runs=at_once):
            waves = torch.sin(times * torch.arange(1, 65, dtype=torch.float64))
            noisy = torch.where(tokens == tokens, waves, tokens) if meets else waves
        exact = torch.sin(times * torch.arange(1, 65))
        return ((of_run(0, noisy) - exact) / exact).abs().median().item()

    unit = rounding_unit(dtype)
    assert deviation((times,), meets=False) < 1e-6
    assert 0.1 * unit < deviation((times,), meets=True) < unit
    assert deviation((), meets=False) > 2 * unit


STEPS = {
    "lerp": (lambda start, other: start.lerp(other, 0.375), lambda start, other: start + 0.375 * (other - start)),
    "addcmul": (
        lambda start, other: start.addcmul(other, other, value=0.25),
        lambda start, other: start + 0.25 * (other * other),
    ),
    "addcdiv_": (lambda start, other: start.clone().addcdiv_(other, start), lambda start, other: start + other / start),
}


@pytest.mark.parametrize("at_once", (None, 3))
@pytest.mark.parametrize("name", STEPS)
def test_what_one_operation_does_in_steps_is_rounded_in_each(name: str, at_once: int | None) -> None:
    """What is left where they cancel is their rounding, not that of the rest."""
    operation, steps = STEPS[name]
    other = (2 ** (4 * torch.rand(4096, generator=torch.Generator().manual_seed(1), dtype=torch.float64))).float().double()
    start, other = {
        "lerp": (-0.5876 * other, other),
        "addcmul": (-0.2387 * other**2, other),
        "addcdiv_": (1.0234 * other.sqrt(), -other),
    }[name]
    start = start.float().double()
    with RoundingNoise("float32", "strict", 0, runs=at_once):
        noisy = operation(start, other)
    exact, rounded = steps(start, other), steps(start.float(), other.float()).double()
    found, predicted = (((each - exact) / start).square().mean().sqrt() for each in (rounded, of_run(at_once and 2, noisy)))
    assert 0.5 < found / predicted < 1.5


def test_exact_values_get_no_noise() -> None:
    left, right = draw(8, 32).sign(), draw(32, 8, seed=1).sign()
    for dtype in DTYPES:
        with RoundingNoise(dtype, "eager", 0):
            assert torch.equal(left.where(left > 0, 0.0) * 0.5 + right.mT, left.where(left > 0, 0.0) * 0.5 + right.mT)


# ---------------------------------------------------------------------------------------------------------- the limits


@pytest.mark.parametrize(
    ("rows", "columns", "shared"), [(1, 1, False), (4, 4, False), (64, 64, False), (1, 64, True), (64, 16, True)]
)
def test_honest_errors_stay_within_every_limit(rows: int, columns: int, shared: bool) -> None:
    """Independent errors of one deviation, or one error shared by each row, as where all depends on one rounded factor."""
    value, generator = draw(rows, columns), torch.Generator().manual_seed(7)

    def errors() -> torch.Tensor:
        drawn = torch.randn(rows, 1 if shared else columns, dtype=torch.float64, generator=generator)
        return 1e-3 * drawn.expand(rows, columns) * value.abs()

    for _ in range(300):
        budget = spread({"out": value}, {"out": torch.stack([value + errors() for _ in range(12)])})["out"]
        statistics = measure(value + errors(), budget, torch.float64, pooled=True).statistics()
        assert statistics.worst <= 1, statistics


def test_many_small_faults_exceed_the_limits_of_their_statistic() -> None:
    elements, spread_variance = 100_000, 200_000.0
    lossy = Errors(0.5, elements * (1.1 * RMS_LIMIT) ** 2, 0.0, spread_variance, elements, elements).statistics()
    biased = Errors(0.5, elements * 1.0, elements * 1.5 * BIAS_LIMIT, spread_variance, elements, elements).statistics()
    assert lossy.rms is not None and lossy.rms > 1 and lossy.max < 1
    assert biased.bias is not None and biased.bias > 1 and biased.max < 1


# ------------------------------------------------------------------------------------------------- right and wrong ones


def in_dtypes() -> list[tuple[str, str, str]]:
    """Each contract's regimes in its dtypes; each of a model in one of them in turns, unless many cases are asked for."""
    return [
        (name, regime.name, dtype)
        for name, row in contracts().items()
        for place, regime in enumerate(row.regimes)
        for dtype in (row.dtypes[place % len(row.dtypes) :][:1] if row.rigid and CASES == 1 else row.dtypes)
    ]


@pytest.mark.parametrize(("contract", "regime", "dtype"), in_dtypes())
def test_right_variants_raise_no_alarm(contract: str, regime: str, dtype: str) -> None:
    found = judge_variants(contract, dtype, drawn_cases(contract, regime, CASES, seed=CASES))
    assert found.judged >= 3 * CASES
    assert not found.alarms, "\n".join(found.alarms[:5])


@pytest.mark.parametrize(
    ("name", "statistic"),
    [
        ("output-truncated", "bias"),
        ("result-two-thousandths-off", "bias"),
        ("bfloat16-accumulator-of-the-second-product", "rms"),
        ("gate-and-up-rounded", "rms"),
    ],
)
def test_precision_faults_that_no_single_element_shows(name: str, statistic: str) -> None:
    subject = next(each for each in faults() if each.name == name).subject()
    case = Case(**subject.contract.landmarks[0], regime="dithered", seed=0)
    violation = check(subject, properties()["parity"], case, Ledger())
    assert violation is not None
    assert violation.message.startswith(f"hidden_states_out: {statistic}")
    assert "max 0." in violation.details[1]


@pytest.mark.parametrize("name", [each for each in contracts() if each.startswith("train_")])
def test_runs_of_a_training_step_are_made_at_once(name):
    row = find_contract(name)
    case = landmark_cases(name, "fresh")[0]
    run = functools.partial(reference_run, row, exact_inputs(row, case, "float32"), options(row, case), None)
    noisy = noisy_runs(run, "float32", "strict")  # or else it raises RunsDiffer
    assert all(each.shape == (NOISE_RUNS, *exact.shape) and each.isfinite().all() for each, exact in zip(
        noisy.values(), run().values(), strict=True
    ))  # fmt: skip
    assert (noisy["metrics/gradient_norm"] != noisy["metrics/gradient_norm"][0]).any()
