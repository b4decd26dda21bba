"""Is this result right? Form first, then the choice of ids, then every value against its budget."""

import math
from typing import Any

import torch

from gaugeblock.conformance.cases import Case, dtypes_of
from gaugeblock.conformance.contract import Contract, Output, Tensors, argument_of
from gaugeblock.conformance.diagnosis import describe_element, diagnose
from gaugeblock.conformance.error_budget import (
    KAPPA,
    Budget,
    Errors,
    element_errors,
    measure,
)
from gaugeblock.conformance.oracle import GRADIENT, budgets, selection_scores
from gaugeblock.conformance.registry import suggest
from gaugeblock.conformance.verdict import Statistics


class Violation(AssertionError):
    """A broken promise: one line, and what helps to find the cause."""

    def __init__(self, message: str, diagnosis: str = "", details: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message, self.diagnosis, self.details = message, diagnosis, details


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


def judge(contract: Contract, case: Case, dtype: str, profile: str, results: Tensors) -> dict[str, Errors]:
    """Judges every output and gradient of one call.

    Returns:
        The errors of each, to be pooled.

    Raises:
        Violation: At the first that is wrong.
    """
    results = {key: tensor.cpu() for key, tensor in results.items()}
    chosen = check_choice(contract, case, dtype, results)
    gradients = any(key.startswith(GRADIENT) for key in results)
    judged = budgets(contract, case, dtype, profile, gradients=gradients, chosen=chosen)
    regime = contract.regime(case.regime)
    errors: dict[str, Errors] = {}
    for key, budget in judged.items():
        if key in results:
            target = results[key].dtype
            if not budget.value.is_floating_point():
                require_exact(key, results[key], budget.value.to(target), "it is an integer")
            elif regime.judged == "exact" and profile == "strict":
                require_exact(key, results[key], budget.value.to(target))
                errors[key] = Errors()
            else:
                independent = regime.judged == "budget" and case.layout != "broadcast"  # equal rows have equal errors
                errors[key] = measure(results[key], budget, target, pooled=independent)
                require_within(key, results[key], budget, errors[key])
    return errors


def require_exact(
    key: str, result: torch.Tensor, expected: torch.Tensor, why: str = "every partial sum of this case is"
) -> None:
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


def check_choice(contract: Contract, case: Case, dtype: str, results: Tensors) -> torch.Tensor | None:
    """The ids that the candidate chose, as int64, if the scores and their error allow them.

    They must be distinct and in range, hold every id that is among the best whatever the rounding (`must`) and only
    ids that can be among the best (`may`), in descending order of score.

    Raises:
        Violation: Otherwise.
    """
    if contract.selection is None:
        return None
    spec = next(output for output in contract.outputs if output.indexes)
    ids = results[spec.name].to(torch.int64)
    _check_ids(spec, ids, case.parameters[str(spec.indexes)])
    scores, groups = selection_scores(contract, case, dtype)
    must, may = must_and_may(scores, groups, case.parameters)
    returned = torch.zeros_like(must).scatter(1, ids, True)
    _reject(~may & returned, spec, ids, scores, "chosen, though it cannot be among the best")
    _reject(must & ~returned, spec, ids, scores, "not chosen, though it is among the best whatever the rounding")
    if groups is not None:
        _check_groups(spec, ids, scores, groups, case.parameters["topk_groups"])
    error = _score_error(scores)
    highest, lowest = (bound.gather(1, ids) for bound in (scores.value + error, scores.value - error))
    unsorted = lowest[:, 1:] > highest[:, :-1]
    if unsorted.any():
        row = int(unsorted.any(1).nonzero()[0])
        raise Violation(
            f"{spec.name} is not sorted by descending score",
            diagnose(unsorted, None),
            (f"{spec.name}[{row}] = {ids[row].tolist()}",),
        )
    return ids


def must_and_may(scores: Budget, groups: Budget | None, parameters: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row, which ids are among the best `top_k` whatever the rounding, and which can be."""
    low, high = _bounds(scores)
    if groups is None:
        return _must_and_may(low, high, parameters["top_k"])
    must_group, may_group = _must_and_may(*_bounds(groups), parameters["topk_groups"])
    group = _group_of_each(scores, groups)
    kept, possible = must_group[:, group], may_group[:, group]
    must, _ = _must_and_may(low.masked_fill(~kept, -math.inf), high.masked_fill(~possible, -math.inf), parameters["top_k"])
    together = kept.unsqueeze(1) | (group.unsqueeze(1) == group)  # [T, i, j]: wherever i can be chosen, so can j
    betters = ((low.unsqueeze(1) > high.unsqueeze(2)) & together).sum(2)
    return must, possible & (betters < parameters["top_k"])


def _group_of_each(scores: Budget, groups: Budget) -> torch.Tensor:
    """The group of each expert, `[E]`."""
    return torch.arange(groups.value.shape[1]).repeat_interleave(scores.value.shape[1] // groups.value.shape[1])


def _bounds(scores: Budget) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest that an honest score can be; a NaN row can be anything."""
    error = _score_error(scores)
    unknown = scores.value.isnan().any(1, keepdim=True)
    low = (scores.value - error).nan_to_num(-math.inf, math.inf, -math.inf)
    high = (scores.value + error).nan_to_num(math.inf, math.inf, -math.inf)
    return low.masked_fill(unknown, -math.inf), high.masked_fill(unknown, math.inf)


def _score_error(scores: Budget) -> torch.Tensor:
    """Propagated error, an ulp, and on machines that flush subnormal numbers to zero the smallest normal one."""
    float32 = torch.finfo(torch.float32)
    error = KAPPA * scores.variance.sqrt() + float32.eps * scores.value.abs() + float32.smallest_normal
    return error.where(scores.value.isfinite(), 0.0)


def _must_and_may(low: torch.Tensor, high: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    rivals = (high.unsqueeze(1) >= low.unsqueeze(2)).sum(2) - 1  # all that can reach it, itself not counted
    betters = (low.unsqueeze(1) > high.unsqueeze(2)).sum(2)  # all that beat it for certain
    return rivals < count, betters < count


def _check_ids(spec: Output, ids: torch.Tensor, bound: int) -> None:
    outside = (ids < 0) | (ids >= bound)
    if outside.any():
        row = int(outside.any(1).nonzero()[0])
        raise Violation(
            f"{spec.name} is out of range 0..{bound - 1}",
            diagnose(outside, None),
            (f"{spec.name}[{row}] = {ids[row].tolist()}",),
        )
    repeated = ids.sort(1).values.diff(dim=1) == 0
    if repeated.any():
        row = int(repeated.any(1).nonzero()[0])
        raise Violation(
            f"{spec.name} holds an id twice in one row",
            diagnose(repeated.any(1, keepdim=True), None),
            (f"{spec.name}[{row}] = {ids[row].tolist()}",),
        )


def _check_groups(spec: Output, ids: torch.Tensor, scores: Budget, groups: Budget, topk_groups: int) -> None:
    """Where groups tie, `may` holds the ids of all of them, but no row those of more than `topk_groups`."""
    used = torch.zeros_like(groups.value).scatter(1, _group_of_each(scores, groups)[ids], 1.0).sum(1)
    too_many = (used > topk_groups) & ~scores.value.isnan().any(1)
    if too_many.any():
        row = int(too_many.nonzero()[0])
        raise Violation(
            f"{spec.name} holds ids of {int(used[row])} groups, of which {topk_groups} may be kept",
            diagnose(too_many.unsqueeze(1), None),
            (f"{spec.name}[{row}] = {ids[row].tolist()}",),
        )


def _reject(wrong: torch.Tensor, spec: Output, ids: torch.Tensor, scores: Budget, what: str) -> None:
    if wrong.any():
        row, expert = wrong.nonzero()[0].tolist()
        raise Violation(
            f"{spec.name}: id {expert} is {what}",
            diagnose(wrong.any(1, keepdim=True), None),
            (f"{spec.name}[{row}] = {ids[row].tolist()}; score of {expert}: {scores.value[row, expert].item():.9g}",),
        )


def _times(units: float) -> str:
    return "infinitely far beyond" if math.isinf(units) else f"{units:.3g} times"
