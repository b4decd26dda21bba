"""Property: gradients."""

from gaugeblock.conformance.engine.calls import argument_of
from gaugeblock.conformance.engine.properties import conformance_property
from gaugeblock.conformance.engine.trial import Trial


@conformance_property(regimes="differentiable", needs=("differentiable",), requires=("gradients",), every_dtype=True, covers=2)
def test_gradients(trial: Trial) -> None:
    """Every differentiable input gets the oracle's gradient through a random cotangent, within its error budget."""
    trial.judge(trial.run(gradients=True))


@conformance_property(frameworks=("torch",), needs=("differentiable",), weight=0.25, requires=("gradients",), of_parts=True)
def test_gradient_subsets(trial: Trial) -> None:
    """A gradient is right when it is the only one asked for: that of each argument, and of one entry of a state dict."""
    inputs = trial.inputs()
    entries: dict[str, list[str]] = {}
    for key in trial.contract.differentiable(inputs):
        entries.setdefault(argument_of(key), []).append(key)
    for keys in entries.values():
        trial.judge(trial.run(inputs, gradients=True, wanted=[keys[trial.case.seed % len(keys)]]))
