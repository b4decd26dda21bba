"""How far an implementation's results are from the oracle: the statistics of the gate, as numbers to be kept."""

from collections import defaultdict
from collections.abc import Iterator

from gaugeblock.conformance.engine.budget.error_budget import Errors, measure
from gaugeblock.conformance.engine.budget.oracle import budgets, rounded_cotangents
from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.devices import available_devices
from gaugeblock.conformance.engine.frameworks import CALLERS, Call
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.inputs.cases import Case, make_inputs, options
from gaugeblock.conformance.engine.judging.choice import check_choice
from gaugeblock.conformance.engine.registry import implementations, load
from gaugeblock.conformance.engine.suggestion import one_line
from gaugeblock.conformance.engine.trial import Subject

DEVICE = available_devices()[-1]  # the GPU where there is one


def accuracies(contract: Contract, seeds: int) -> Iterator[tuple[tuple[str, str], dict[str, float] | str]]:
    """For each dtype and implementation that can be tested here, rms and bias of its worst output, or why there are none."""
    for implementation in implementations(contract.name):
        for dtype in implementation.dtypes:
            unclaimed = DEVICE not in implementation.devices or dtype not in contract.dtypes or implementation.world_sizes
            if unclaimed or Subject(implementation, dtype, DEVICE).untestable:
                continue
            try:
                answer: dict[str, float] | str = accuracy(contract, implementation, dtype, seeds)
            except ImportError:
                continue
            except Exception as error:
                answer = f"{type(error).__name__}: {one_line(error)}"
            yield (dtype, implementation.name), answer


def accuracy(contract: Contract, implementation: Implementation, dtype: str, seeds: int) -> dict[str, float]:
    """Worst rms and bias over outputs and gradients, each pooled over seeds of the first landmark, in units of their limits.

    All are measured by the strict profile's budget, so that implementations can be compared.
    """
    pooled: dict[str, Errors] = defaultdict(Errors)
    for seed in range(seeds):
        case = Case(**contract.landmarks[0], regime=contract.regimes[0].name, seed=seed)
        gradients = implementation.differentiable and any(spec.differentiable for spec in contract.inputs)
        cotangents = rounded_cotangents(contract, case, dtype) if gradients else None
        inputs = {key: each.to(DEVICE) for key, each in make_inputs(contract, case, dtype).items()}
        if cotangents is not None:
            cotangents = {key: each.to(DEVICE) for key, each in cotangents.items()}
        call = Call(inputs, options(contract, case), cotangents)
        called = CALLERS[implementation.framework](contract, load(implementation), call)
        results = {key: each.cpu() for key, each in called.items()}
        chosen = check_choice(contract, case, dtype, results)
        for key, budget in budgets(contract, case, dtype, "strict", gradients=gradients, chosen=chosen).items():
            if budget.value.is_floating_point():
                pooled[key] += measure(results[key], budget, results[key].dtype, pooled=True)
    statistics = [errors.statistics() for errors in pooled.values()]
    return {
        "rms": max(each.rms for each in statistics if each.rms is not None),
        "bias": max(each.bias for each in statistics if each.bias is not None),
    }
