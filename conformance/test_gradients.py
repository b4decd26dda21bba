"""Property: gradients."""

from gaugeblock.conformance.properties import conformance_property
from gaugeblock.conformance.trial import Trial


@conformance_property(regimes="differentiable", needs=("differentiable",), requires=("gradients",))
def test_gradients(trial: Trial) -> None:
    """Every differentiable input gets the oracle's gradient through a random cotangent, within its error budget."""
    trial.judge(trial.run(gradients=True))


@conformance_property(needs=("differentiable",), weight=0.25, requires=("gradients",))
def test_gradient_subsets(trial: Trial) -> None:
    """A gradient is right when it is the only one asked for."""
    inputs = trial.inputs()
    for key in trial.contract.differentiable(inputs):
        trial.judge(trial.run(inputs, gradients=True, wanted=[key]))
