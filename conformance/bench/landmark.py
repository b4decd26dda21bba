"""Calls at a contract's first landmark, of every implementation and dtype that can be tested here: what numbers are kept of."""

from collections.abc import Callable, Iterator

from gaugeblock.conformance.engine.budget.oracle import rounded_cotangents
from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.devices import available_devices
from gaugeblock.conformance.engine.frameworks import Call, Raised
from gaugeblock.conformance.engine.inputs.cases import Case, make_inputs, options
from gaugeblock.conformance.engine.processes.perform import USUAL, perform
from gaugeblock.conformance.engine.registry import Implementation, implementations, one_line
from gaugeblock.conformance.engine.trial import Subject
from gaugeblock.conformance.engine.vocabulary import Tensors

DEVICE = available_devices()[-1]  # the GPU where there is one

Answer = dict[str, float] | str  # a number for each metric, or why there is none


def answers(
    contract: Contract, ask: Callable[[Contract, Implementation, str], Answer]
) -> Iterator[tuple[tuple[str, str], Answer]]:
    """What is answered of each dtype and implementation that can be tested here, or why it cannot be."""
    for implementation in implementations(contract.name):
        for dtype in implementation.dtypes:
            unclaimed = DEVICE not in implementation.devices or dtype not in contract.dtypes or implementation.world_sizes
            if unclaimed or Subject(implementation, dtype, DEVICE).untestable:
                continue
            try:
                answer = ask(contract, implementation, dtype)
            except Raised as error:
                if "ImportError" in error.kinds:
                    continue
                answer = str(error)
            except Exception as error:
                answer = f"{type(error).__name__}: {one_line(error)}"
            yield (dtype, implementation.name), answer


def case_of(contract: Contract, seed: int) -> Case:
    """The first landmark in the main regime."""
    return Case(**contract.landmarks[0], regime=contract.regimes[0].name, seed=seed)


def has_gradients(contract: Contract, implementation: Implementation) -> bool:
    """Whether they are asked for too."""
    return implementation.differentiable and any(spec.differentiable for spec in contract.inputs)


def results_of(contract: Contract, implementation: Implementation, dtype: str, seed: int) -> Tensors:
    """Outputs, and gradients where there are some, on the CPU; kernels are interpreted as the gate does it."""
    case = case_of(contract, seed)
    cotangents = rounded_cotangents(contract, case, dtype) if has_gradients(contract, implementation) else None
    call = Call(
        _on_device(make_inputs(contract, case, dtype)),
        options(contract, case),
        None if cotangents is None else _on_device(cotangents),
        jit=implementation.jit,
    )
    results, _ = perform(implementation, call, USUAL)
    return {key: each.cpu() for key, each in results.items()}


def _on_device(tensors: Tensors) -> Tensors:
    """Copies, so that a call may write to them and each call's lie elsewhere."""
    return {key: each.to(DEVICE, copy=True) for key, each in tensors.items()}
