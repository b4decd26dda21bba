"""How far an implementation's results are from the oracle: the statistics of the gate, as numbers to be kept."""

import math
from collections import defaultdict

from gaugeblock.conformance.bench.landmark import case_of, has_gradients, results_of
from gaugeblock.conformance.engine.budget.error_budget import Errors, measure
from gaugeblock.conformance.engine.budget.oracle import budgets
from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.judging.choice import check_choice

SEEDS = 3  # cases whose errors are pooled


def accuracy(contract: Contract, implementation: Implementation, dtype: str) -> dict[str, float]:
    """Worst rms and bias over outputs and gradients, each pooled over seeds of the first landmark, in units of their limits.

    All are measured by the strict profile's budget, so that implementations can be compared. Both are 0 where every result has
    to be exact, and is.

    Raises:
        ValueError: If a result that has to be exact is not, which no number of limits says.
    """
    pooled: dict[str, Errors] = defaultdict(Errors)
    gradients = has_gradients(contract, implementation)
    for seed in range(SEEDS):
        case, results = case_of(contract, seed), results_of(contract, implementation, dtype, seed)
        chosen = check_choice(contract, case, dtype, results)
        for key, budget in budgets(contract, case, dtype, "strict", gradients=gradients, chosen=chosen).items():
            if budget.value.is_floating_point():
                pooled[key] += measure(results[key], budget, results[key].dtype, pooled=True)
    for key, errors in pooled.items():
        if not math.isfinite(errors.worst):
            raise ValueError(f"{key} differs from the oracle where nothing may be rounded")
    statistics = [errors.statistics() for errors in pooled.values()]
    return {
        "rms": max((each.rms for each in statistics if each.rms is not None), default=0.0),
        "bias": max((each.bias for each in statistics if each.bias is not None), default=0.0),
    }
