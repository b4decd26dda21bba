"""Properties of Triton kernels: they really ran, and do not depend on the order of their programs."""

from gaugeblock.conformance.judge import Violation
from gaugeblock.conformance.properties import conformance_property
from gaugeblock.conformance.trial import Trial


@conformance_property(kinds=("triton",), weight=0.25)
def test_path_witness(trial: Trial) -> None:
    """Triton kernels are launched, forward and backward: no silent fall back to another path."""
    trial.run()
    forward = sum(trial.findings.launches.values())
    if not forward:
        raise Violation("no Triton kernel was launched")
    trial.run(gradients=True)
    if sum(trial.findings.launches.values()) <= forward:
        raise Violation("no Triton kernel was launched by the backward pass")


@conformance_property(kinds=("triton",), devices=("cpu",), weight=0.25)
def test_program_order(trial: Trial) -> None:
    """The programs of a launch may run in any order: under the interpreter, a shuffled one gives the same bits."""
    expected = trial.run(gradients=trial.implementation.differentiable)
    shuffled = trial.run(gradients=trial.implementation.differentiable, program_order=trial.case.seed)
    trial.same_bits(shuffled, expected, "when programs run in another order")
