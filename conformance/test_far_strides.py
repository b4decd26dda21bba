"""Property: offsets of more than 32 bits."""

from gaugeblock.conformance.cases import lay_out
from gaugeblock.conformance.contract import argument_of
from gaugeblock.conformance.properties import conformance_property
from gaugeblock.conformance.trial import Trial


@conformance_property(frameworks=("torch",), devices=("cpu",), weight=0.25)
def test_far_strides(trial: Trial) -> None:
    """Elements of an argument may lie more than 2^31 apart: offsets have 64 bits, forward and backward."""
    inputs = trial.inputs()
    entries: dict[str, list[str]] = {}
    for key in inputs:
        entries.setdefault(argument_of(key), []).append(key)
    for keys in entries.values():
        key = keys[trial.case.seed % len(keys)]
        trial.judge(trial.run(inputs | {key: lay_out(inputs[key], "far")}, gradients=trial.implementation.differentiable))
