"""Properties of Triton kernels: they really ran, and do not depend on the order of their programs."""

from gaugeblock.conformance.judge import Violation
from gaugeblock.conformance.properties import conformance_property
from gaugeblock.conformance.trial import Trial
from gaugeblock.conformance.triton_checks.interpreter import shuffled_programs


@conformance_property(kinds=("triton",), weight=0.25)
def test_path_witness(trial: Trial) -> None:
    """Triton kernels are launched, forward and backward: no silent fall back to another path."""
    trial.run()
    forward = trial.watched.launches.total()
    if not forward:
        raise Violation("no Triton kernel was launched")
    trial.run(gradients=True)
    if trial.watched.launches.total() <= forward:
        raise Violation("no Triton kernel was launched by the backward pass")


@conformance_property(kinds=("triton",), devices=("cpu",), weight=0.25)
def test_program_order(trial: Trial) -> None:
    """The programs of a launch may run in any order: under the interpreter, a shuffled one gives the same bits."""
    expected = trial.run(gradients=trial.implementation.differentiable)
    with shuffled_programs(trial.case.seed):
        trial.same_bits(trial.run(gradients=trial.implementation.differentiable), expected, "when programs run in another order")
