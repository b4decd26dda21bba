"""Is this result right? Form first, then what it chose, then every value against its budget."""

import math

import torch

from gaugeblock.conformance.engine.budget.error_budget import Budget, Errors, element_errors, measure
from gaugeblock.conformance.engine.budget.oracle import GRADIENT, budgets
from gaugeblock.conformance.engine.calls import argument_of
from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.inputs.cases import Case, dtypes_of
from gaugeblock.conformance.engine.judging.choice import check_choice
from gaugeblock.conformance.engine.judging.diagnosis import describe_element, diagnose
from gaugeblock.conformance.engine.judging.verdict import Statistics
from gaugeblock.conformance.engine.judging.violation import Violation
from gaugeblock.conformance.engine.suggestion import suggest
from gaugeblock.conformance.engine.vocabulary import Tensors


def check_form(contract: Contract, case: Case, dtype: str, device: str, results: Tensors, framework: str = "torch") -> None:
    """Outputs and gradients have the shapes, dtypes and device of the contract; ids may have any integer dtype."""
    specs, dtypes = contract.specs(case.parameters), dtypes_of(contract, case.parameters, dtype)
    outputs = {spec.name for spec in contract.outputs}
    due_keys = [key for key in specs if argument_of(key) in outputs]
    for key in results:
        if key not in due_keys and not key.startswith(GRADIENT):
            raise Violation(f"{key} is returned, but not among the results{suggest(key, due_keys)}")
    for key in due_keys:
        if key not in results:
            raise Violation(f"{key} is missing among the results")
        spec, result = specs[key], results[key]
        if tuple(result.shape) != spec.sizes(case.parameters):
            named = f" = [{', '.join(map(str, spec.shape))}]" if spec.shape else ""
            raise Violation(f"{key} has shape {tuple(result.shape)}, expected {spec.sizes(case.parameters)}{named}")
        if spec.indexes:
            if result.is_floating_point() or result.dtype == torch.bool:
                raise Violation(f"{key} is {result.dtype}, expected an integer dtype")
        elif result.dtype != dtypes[key] and not (framework == "jax" and is_narrowed(result.dtype, dtypes[key])):
            raise Violation(f"{key} is {result.dtype}, expected {dtypes[key]}")
        if result.device.type != device:
            raise Violation(f"{key} is on {result.device}, expected {device}")
    for key in (each for each in results if each.startswith(GRADIENT)):
        argument = key.removeprefix(GRADIENT)
        if results[key].dtype != dtypes[argument]:
            raise Violation(f"{key} is {results[key].dtype}, expected {dtypes[argument]}")
        shape = specs[argument].sizes(case.parameters)
        if tuple(results[key].shape) != shape:
            raise Violation(f"{key} has shape {tuple(results[key].shape)}, expected {shape}")


def is_narrowed(dtype: torch.dtype, due: torch.dtype) -> bool:
    """JAX holds int32 where torch holds int64."""
    return dtype == torch.int32 and due == torch.int64


def judge(contract: Contract, case: Case, dtype: str, rounding: str, results: Tensors) -> dict[str, Errors]:
    """Judges every output and gradient of one call.

    Returns:
        The errors of each, to be pooled.

    Raises:
        Violation: At the first that is wrong.
    """
    results = {key: tensor.cpu() for key, tensor in results.items()}
    chosen = check_choice(contract, case, dtype, results)
    gradients = any(key.startswith(GRADIENT) for key in results)
    judged = budgets(contract, case, dtype, rounding, gradients=gradients, chosen=chosen)
    regime = contract.regime(case.regime)
    errors: dict[str, Errors] = {}
    for key, budget in judged.items():
        if key in results:
            target = results[key].dtype
            if not budget.value.is_floating_point():
                require_exact(key, results[key], budget.value.to(target), "it is no floating number")
            elif regime.judged == "exact" and rounding == "strict":
                require_exact(key, results[key], budget.value.to(target))
                errors[key] = Errors()
            else:
                independent = regime.judged == "budget" and case.layout != "broadcast"  # equal rows have equal errors
                errors[key] = measure(results[key], budget, target, pooled=independent)
                require_within(key, results[key], budget, errors[key])
    return errors


def require_exact(key: str, result: torch.Tensor, expected: torch.Tensor, why: str = "every partial sum of this case is") -> None:
    """Equal to the oracle (zeros of either sign are equal)."""
    wrong = ~((result == expected) | (result.isnan() & expected.isnan()))
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise Violation(
            f"{key}: {int(wrong.sum())} of {wrong.numel()} elements are not exact, though {why}",
            diagnose(wrong, None),
            (f"{key}[{', '.join(map(str, index))}] = {result[index].item()!r}, expected {expected[index].item()!r}",),
        )


def require_within(key: str, result: torch.Tensor, budget: Budget, errors: Errors) -> None:
    """No statistic of one output beyond its limit."""
    statistics = errors.statistics()
    if statistics.worst <= 1:
        return
    units = element_errors(result, budget, result.dtype)
    raise Violation(
        f"{key}: {name_worst(statistics)}",
        diagnose(units > 1, (result.to(torch.float64) - budget.value).nan_to_num() * budget.value.sign().nan_to_num()),
        (describe_element(key, result, budget, units), describe_statistics(statistics)),
    )


def name_worst(statistics: Statistics) -> str:
    """The largest of the three statistics, in words."""
    if statistics.max >= max(statistics.rms or 0, statistics.bias or 0):
        return f"an element lies {_times(statistics.max)} its error budget from the oracle"
    if (statistics.rms or 0) >= (statistics.bias or 0):
        return f"rms error {_times(statistics.rms or 0)} its limit: precision is lost everywhere"
    return f"bias {_times(statistics.bias or 0)} its limit: errors have one sign (truncation, or a wrong scale)"


def describe_statistics(statistics: Statistics) -> str:
    """How each statistic stands to its limit."""
    if statistics.rms is None or statistics.bias is None:
        return f"in units of the limit: max {statistics.max:.3g}; rms and bias are not judged in this regime"
    return (
        f"in units of the limits: max {statistics.max:.3g}, rms {statistics.rms:.3g}, bias {statistics.bias:.3g}; "
        f"{statistics.elements} elements"
    )


def _times(units: float) -> str:
    return "infinitely far beyond" if math.isinf(units) else f"{units:.3g} times"
