"""Property: layout invariance."""

from gaugeblock.conformance.cases import lay_out, layouts_of
from gaugeblock.conformance.properties import conformance_property
from gaugeblock.conformance.trial import Trial


@conformance_property(frameworks=("torch",), weight=0.25)
def test_layout(trial: Trial) -> None:
    """Strides, storage offsets and broadcast rows of the inputs do not matter; what lies between the elements is NaN."""
    for layout in layouts_of(trial.contract):
        case = trial.case.replace(layout=layout)
        inputs = {key: lay_out(tensor, layout) for key, tensor in trial.inputs(case).items()}
        trial.judge(trial.run(inputs, case=case), case)


@conformance_property(frameworks=("torch",), needs=("differentiable",), weight=0.25, requires=("gradients",))
def test_gradient_layout(trial: Trial) -> None:
    """Gradients are right for inputs of any layout and for a cotangent of any strides."""
    layouts = layouts_of(trial.contract)
    case = trial.case.replace(layout=layouts[trial.case.seed % len(layouts)])
    inputs = {key: lay_out(tensor, case.layout) for key, tensor in trial.inputs(case).items()}
    trial.judge(trial.run(inputs, gradients=True, case=case, cotangent_layout="transposed"), case)
