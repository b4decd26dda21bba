"""Properties of Triton kernels: they really ran, their programs are independent, and masked lanes do not count."""

from gaugeblock.conformance.engine.judging.judge import Violation
from gaugeblock.conformance.engine.properties import conformance_property
from gaugeblock.conformance.engine.trial import Trial


@conformance_property(kinds=("triton",), weight=0.25)
def test_path_witness(trial: Trial) -> None:
    """Triton kernels are launched, forward and, where there are gradients, backward: no silent fall back to another path."""
    trial.run()
    forward = sum(trial.findings.launches.values())
    if not forward:
        raise Violation("no Triton kernel was launched")
    if not trial.contract.gradients:
        return
    trial.run(gradients=True)
    if sum(trial.findings.launches.values()) <= forward:
        raise Violation("no Triton kernel was launched by the backward pass")


@conformance_property(kinds=("triton",), devices=("cpu",), weight=0.25, of_parts=True)
def test_program_order(trial: Trial) -> None:
    """The programs of a launch may run in any order: a shuffled one, a few programs at a time, gives the same bits."""
    expected = trial.run(gradients=trial.implementation.differentiable)
    shuffled = trial.run(gradients=trial.implementation.differentiable, program_order=trial.case.seed)
    trial.same_bits(shuffled, expected, "when programs run in another order")


@conformance_property(kinds=("triton",), devices=("cpu",), weight=0.25, of_parts=True)
def test_races(trial: Trial) -> None:
    """No two programs of a launch write one element, forward or backward; with atomics they may."""
    trial.run(gradients=trial.implementation.differentiable)
    if trial.findings.races:
        raise Violation("; ".join(trial.findings.races))


@conformance_property(kinds=("triton",), devices=("cpu",), needs=("no assumes_zero_masked_lanes",), weight=0.25, of_parts=True)
def test_masked_lanes(trial: Trial) -> None:
    """What a load leaves in lanes that are masked without `other` does not count: NaN and odd integers give the same bits."""
    expected = trial.run(gradients=trial.implementation.differentiable)
    poisoned = trial.run(gradients=trial.implementation.differentiable, poisoned_lanes=True)
    trial.same_bits(poisoned, expected, "when masked lanes do not load 0")
