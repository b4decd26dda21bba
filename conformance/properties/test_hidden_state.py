"""Properties: no state between calls, none in the process."""

from gaugeblock.conformance.engine.judging.judge import Violation
from gaugeblock.conformance.engine.properties import conformance_property
from gaugeblock.conformance.engine.trial import Trial


@conformance_property(needs=("deterministic",), weight=0.25)
def test_hidden_state(trial: Trial) -> None:
    """A call is not changed by another problem in between (A, B, A again), and changes no earlier result."""
    batch = trial.contract.batch
    more = 0 if trial.implementation.framework == "jax" else 1  # which compiles for every size
    between = trial.case.replace(**{batch: trial.case.parameters[batch] + more, "seed": trial.case.seed + 1})
    first = trial.run()
    call = trial.last()
    trial.judge(trial.run(case=between), between)
    trial.same_bits(trial.again(call), first, "after a later call, which writes to the memory of this result")
    trial.run(case=trial.case.replace(seed=trial.case.seed + 1))
    trial.same_bits(trial.again(call), first, "after a later call of the same sizes, which writes to the memory of this result")
    trial.same_bits(trial.run(), first, "after calls with other inputs")


@conformance_property(weight=0.5)
def test_process_settings(trial: Trial) -> None:
    """A call leaves the settings of the process alone: default dtype, random state, precision, threads, grad mode."""
    trial.run(unusual_settings=trial.case.seed + 1)
    if trial.findings.settings_changed:
        raise Violation(f"the call changes {', '.join(trial.findings.settings_changed)} of the process")


@conformance_property(frameworks=("torch",), weight=0.25)
def test_grad_modes(trial: Trial) -> None:
    """The result is the same under no_grad and inference_mode."""
    for mode in ("no_grad", "inference"):
        trial.judge(trial.run(grad_mode=mode))
