"""The oracle: the PyTorch reference in float64, its error budget, and its choices, cached per case.

An output that is a choice is replayed (`decisions.py`): the other outputs are judged at the choice that the candidate made.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from gaugeblock.conformance.engine.budget import shared
from gaugeblock.conformance.engine.budget.decisions import replay_of
from gaugeblock.conformance.engine.budget.error_budget import NOISE_RUNS, Budget, spread, widest
from gaugeblock.conformance.engine.budget.rounding_noise import RoundingNoise, exact_draws
from gaugeblock.conformance.engine.budget.runs import values_of
from gaugeblock.conformance.engine.calls import apply, nest
from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.inputs.cases import Case, cotangents, dtypes_of, make_inputs, options, value_case
from gaugeblock.conformance.engine.pull_back import pull_back
from gaugeblock.conformance.engine.vocabulary import Tensors

GRADIENT = "gradient of "  # begins the key of a gradient among results
CACHED = 512  # cases; a budget with gradients takes about a megabyte
LARGE = 2**18  # elements of outputs and gradients, from which on runs are done one by one: nothing is won, and memory is lost
_with_gradients: set[Any] = set()  # budgets that were computed with gradients


def reference_run(
    contract: Contract, inputs: Tensors, opts: dict[str, Any], cotangent: Tensors | None = None, formula: Any = None
) -> Tensors:
    """Outputs of the reference or another formula; with cotangents, gradients under keys `"gradient of hidden_states"` too."""
    wanted = contract.differentiable(inputs) if cotangent is not None else []
    leaves = {key: tensor.detach().requires_grad_(key in wanted) for key, tensor in inputs.items()}
    returned = apply(contract, formula or contract.reference, leaves, opts, torch.stack)
    outputs = {key: _widen(tensor) for key, tensor in returned.items()}  # what depends on no floating input is of float32
    if not cotangent:
        return {key: tensor.detach() for key, tensor in outputs.items()}
    through = [key for key in contract.differentiable(outputs) if outputs[key].requires_grad]
    gradients = pull_back(
        [outputs[key] for key in through],
        [leaves[key] for key in wanted],
        [cotangent[key] for key in through],
        materialize=True,
    )
    return {key: tensor.detach() for key, tensor in outputs.items()} | {
        gradient_key(key): gradient for key, gradient in zip(wanted, gradients, strict=True)
    }


def gradient_key(key: str) -> str:
    """How results name the gradient with respect to the input `key`."""
    return GRADIENT + key


def exact_inputs(contract: Contract, case: Case, dtype: str) -> Tensors:
    """The case's inputs, rounded to the dtype under test, then held in float64."""
    return {key: _widen(tensor) for key, tensor in make_inputs(contract, case, dtype).items()}


def rounded_cotangents(contract: Contract, case: Case, dtype: str) -> Tensors:
    """The case's cotangents in the dtypes of the outputs they belong to."""
    dtypes = dtypes_of(contract, case.parameters, dtype)
    return {key: tensor.to(dtypes[key]) for key, tensor in cotangents(contract, case).items()}


def budgets(
    contract: Contract, case: Case, dtype: str, rounding: str, *, gradients: bool = False, chosen: torch.Tensor | None = None
) -> dict[str, Budget]:
    """Oracle and error budget of every output (and gradient), at the choice `chosen` where the operation chooses.

    Integers have no budget but must be equal.
    """
    if dtype == "float32":
        rounding = "strict"  # which rounds as often as "eager": one computation serves all claims
    choice = None if chosen is None else (chosen.numpy().tobytes(), str(chosen.numpy().dtype), tuple(chosen.shape))
    key = contract, value_case(case), dtype, rounding, choice
    if gradients:
        _with_gradients.add(key)
    return _budgets(*key, gradients=key in _with_gradients)  # those with gradients hold the outputs' too


@lru_cache(CACHED)
def _budgets(
    contract: Contract,
    case: Case,
    dtype: str,
    rounding: str,
    choice: tuple[bytes, str, tuple[int, ...]] | None,
    *,
    gradients: bool,
) -> dict[str, Budget]:
    compute = partial(_computed, contract, case, dtype, rounding, choice, gradients=gradients)
    return shared.once(contract.name, (case, dtype, rounding, choice, gradients), compute)


def _computed(
    contract: Contract,
    case: Case,
    dtype: str,
    rounding: str,
    choice: tuple[bytes, str, tuple[int, ...]] | None,
    *,
    gradients: bool,
) -> dict[str, Budget]:
    inputs = exact_inputs(contract, case, dtype)
    cotangent = {key: _widen(each) for key, each in rounded_cotangents(contract, case, dtype).items()} if gradients else None

    def run(formula: Callable[..., Any]) -> Tensors:
        return reference_run(contract, inputs, options(contract, case), cotangent, formula)

    formulas = (contract.reference, contract.rounded_as or contract.reference, *contract.formulas)
    runs: list[Callable[[], Tensors]] = [partial(run, formula) for formula in formulas]
    if choice is not None:
        assert contract.selection is not None
        values, kind, shape = choice
        chosen = torch.from_numpy(np.frombuffer(values, kind).reshape(shape).copy())
        runs = [replay_of(each, contract.selection.output, chosen, contract.selection.none) for each in runs]
    cancelling = contract.regime(case.regime).judged == "worst element"
    wide = [inputs[key] for key, made in make_inputs(contract, case, dtype).items() if made.dtype == torch.float32]
    exact, *noisy = runs
    oracle = exact()
    return widest([_spread(each, oracle, dtype, rounding, cancelling=cancelling, wide=wide) for each in noisy])


def selection_scores(contract: Contract, case: Case, dtype: str) -> tuple[Budget, Budget | None]:
    """Oracle and budget of the scores that the operation chooses by, and of its groups' scores."""
    return _selection_scores(contract, value_case(case), dtype)


@lru_cache(CACHED)
def _selection_scores(contract: Contract, case: Case, dtype: str) -> tuple[Budget, Budget | None]:
    assert contract.selection is not None
    inputs, opts = nest(exact_inputs(contract, case, dtype)), options(contract, case)
    functions = {"scores": contract.selection.scores, "groups": contract.selection.group_scores}

    def run() -> Tensors:
        return {name: function(**inputs, **opts) for name, function in functions.items() if function is not None}

    scored = _spread(run, run(), "float32", "strict", cancelling=False)  # choices are made in float32 under every rounding
    return scored["scores"], scored.get("groups")


def _spread(run: Callable[[], Tensors], oracle: Tensors, dtype: str, rounding: str, **how: Any) -> dict[str, Budget]:
    try:
        noisy = noisy_runs(run, dtype, rounding, at_once=_is_small([each.numel() for each in oracle.values()]), **how)
    except Exception:  # they differ in what torch has no form for; an error of the reference's own comes again
        noisy = noisy_runs(run, dtype, rounding, at_once=False, **how)
    return spread(oracle, noisy)


def _is_small(sizes: Sequence[int]) -> bool:
    """Whether doing all runs at once pays; many tensors, gradients of a model's weights, may be twice as much together."""
    return sum(sizes) <= LARGE or (sum(sizes) <= 2 * LARGE and max(sizes) <= LARGE // 2)


def noisy_runs(
    run: Callable[[], Tensors],
    dtype: str,
    rounding: str,
    *,
    cancelling: bool = False,
    at_once: bool = True,
    wide: Sequence[torch.Tensor] = (),
) -> Tensors:
    """What a run gives under rounding noise, `[NOISE_RUNS, *shape]`; further arguments as of `RoundingNoise`.

    Raises:
        RunsDiffer: `at_once`, which they cannot be.
    """
    if at_once:
        noise = RoundingNoise(dtype, rounding, 0, cancelling=cancelling, runs=NOISE_RUNS, wide=wide, first_rounds=True)
        with noise, exact_draws():
            return {key: values_of(each, NOISE_RUNS) for key, each in run().items()}
    noisy: list[Tensors] = []
    deviations: list[torch.Tensor] = []
    for seed in range(NOISE_RUNS):
        noise = RoundingNoise(
            dtype, rounding, seed, cancelling=cancelling, deviations=deviations, wide=wide, first_rounds=seed == 0
        )
        with noise, exact_draws():
            noisy.append(run())
    return {key: torch.stack([each[key] for each in noisy]) for key in noisy[0]}


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor
