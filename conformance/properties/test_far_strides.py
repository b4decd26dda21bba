"""Property: offsets of more than 32 bits."""

from gaugeblock.conformance.engine.calls import argument_of
from gaugeblock.conformance.engine.inputs.cases import lay_out
from gaugeblock.conformance.engine.judging.judge import Violation
from gaugeblock.conformance.engine.processes.handle import Lost
from gaugeblock.conformance.engine.properties import conformance_property
from gaugeblock.conformance.engine.trial import Trial
from gaugeblock.conformance.engine.vocabulary import Tensors


@conformance_property(frameworks=("torch",), devices=("cpu",), weight=0.25, of_parts=True)
def test_far_strides(trial: Trial) -> None:
    """Elements of an argument may lie more than 2^31 apart: offsets have 64 bits, forward and backward."""
    inputs = trial.inputs()
    entries: dict[str, list[str]] = {}
    for key in inputs:
        entries.setdefault(argument_of(key), []).append(key)
    chosen = [keys[trial.case.seed % len(keys)] for keys in entries.values()]
    try:
        _judge_far(trial, inputs, chosen)
    except Lost:
        raise
    except Violation:
        for key in chosen:  # which of them is it?
            _judge_far(trial, inputs, [key])
        raise


def _judge_far(trial: Trial, inputs: Tensors, keys: list[str]) -> None:
    far = {key: lay_out(inputs[key], "far") for key in keys}
    try:
        trial.judge(trial.run(inputs | far, gradients=trial.implementation.differentiable))
    except Violation as violation:
        violation.message = f"{', '.join(keys)} with elements 2^31 apart: {violation.message}"
        raise
