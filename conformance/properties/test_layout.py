"""Property: layout invariance."""

from gaugeblock.conformance.engine.inputs.cases import lay_out
from gaugeblock.conformance.engine.properties import conformance_property
from gaugeblock.conformance.engine.trial import Trial


@conformance_property(frameworks=("torch",), weight=0.25, layouts=True)
def test_layout(trial: Trial) -> None:
    """Strides, storage offsets and broadcast rows of the inputs, of all and of each alone, do not matter; what lies between the
    elements is NaN."""
    inputs = {key: lay_out(tensor, trial.case.layout_of(key)) for key, tensor in trial.inputs().items()}
    trial.judge(trial.run(inputs))


@conformance_property(frameworks=("torch",), needs=("differentiable",), weight=0.25, requires=("gradients",), layouts=True)
def test_gradient_layout(trial: Trial) -> None:
    """Gradients are right for inputs of any layout and for a cotangent of any strides."""
    inputs = {key: lay_out(tensor, trial.case.layout_of(key)) for key, tensor in trial.inputs().items()}
    trial.judge(trial.run(inputs, gradients=True, cotangent_layout="transposed"))
