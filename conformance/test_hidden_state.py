"""Properties: no state between calls, none in the process."""

from typing import Any

import torch

from gaugeblock.conformance.judge import Violation
from gaugeblock.conformance.properties import conformance_property
from gaugeblock.conformance.trial import Trial


@conformance_property(needs=("deterministic",), weight=0.25)
def test_hidden_state(trial: Trial) -> None:
    """A call is not changed by another problem in between (A, B, A again), and changes no earlier result."""
    batch = trial.contract.batch
    more = 0 if trial.implementation.framework == "jax" else 1  # which compiles for every size
    between = trial.case.replace(**{batch: trial.case.parameters[batch] + more, "seed": trial.case.seed + 1})
    first = trial.run()
    memory = trial.raw
    trial.judge(trial.run(case=between), between)
    trial.same_bits(trial.whole(memory), first, "after a later call, which writes to the memory of this result")
    trial.run(case=trial.case.replace(seed=trial.case.seed + 1))
    trial.same_bits(trial.whole(memory), first, "after a later call of the same sizes, which writes to the memory of this result")
    trial.same_bits(trial.run(), first, "after calls with other inputs")


@conformance_property(weight=0.5)
def test_process_settings(trial: Trial) -> None:
    """A call leaves the settings of the process alone: default dtype, random state, precision, threads, grad mode."""
    inputs = trial.inputs()
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_default_dtype(torch.float32)  # an earlier property may have let the candidate change it
    torch.set_float32_matmul_precision("medium")  # unusual values, which a call that sets usual ones changes
    torch.set_num_threads(threads + 1)
    torch.manual_seed(trial.case.seed + 1)
    torch.rand(1)  # away from where a seed would put the random state
    try:
        before = _settings()
        trial.run(inputs)
        changed = [name for name, value in _settings().items() if value != before[name]]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
    if changed:
        raise Violation(f"the call changes {', '.join(changed)} of the process")


@conformance_property(frameworks=("torch",), weight=0.25)
def test_grad_modes(trial: Trial) -> None:
    """The result is the same under no_grad and inference_mode."""
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            trial.judge(trial.run())


def _settings() -> dict[str, Any]:
    return {
        "the default dtype": torch.get_default_dtype(),
        "the random state": torch.get_rng_state().numpy().tobytes(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "the number of threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
    }
