"""Properties of memory: inputs unchanged, outputs fully written, nothing outside touched, no hidden caches."""

from gaugeblock.conformance.engine.budget.oracle import rounded_cotangents
from gaugeblock.conformance.engine.inputs.cases import guarded
from gaugeblock.conformance.engine.judging.judge import Violation
from gaugeblock.conformance.engine.properties import conformance_property
from gaugeblock.conformance.engine.trial import Trial, digest


@conformance_property(frameworks=("torch",), weight=0.25)
def test_inputs_unchanged(trial: Trial) -> None:
    """A call, forward and backward, leaves its inputs as they were, and the gradients of its results that backward is given."""
    inputs = trial.inputs()
    trial.run(inputs, gradients=trial.implementation.differentiable, write_back=True)
    trial.same_bits(inputs, trial.inputs(), "after the call: an input was written to")
    if trial.implementation.differentiable and trial.contract.differentiable(inputs):
        given = rounded_cotangents(trial.contract, trial.case, trial.subject.dtype)
        trial.same_bits(trial.cotangents, given, "after the call: backward wrote to the gradient of its result")


@conformance_property(frameworks=("torch",), covers=2, of_parts=True)
def test_fully_written(trial: Trial) -> None:
    """Every element of every result is written: fresh memory is filled with NaN before the candidate gets it."""
    trial.judge(trial.run(gradients=trial.implementation.differentiable, fresh_memory_is_nan=True))


@conformance_property(frameworks=("torch",), weight=0.5, covers=2, of_parts=True)
def test_out_of_bounds(trial: Trial) -> None:
    """Nothing outside the inputs is read into a result or written: guard zones of NaN lie around each of them."""
    made = {key: guarded(tensor) for key, tensor in trial.inputs().items()}
    zones = {key: buffer.clone() for key, (_, buffer) in made.items()}
    inputs = {key: inside for key, (inside, _) in made.items()}
    results = trial.run(inputs, gradients=trial.implementation.differentiable, write_back=True)
    for key, (_, buffer) in made.items():
        if digest({key: buffer}) != digest({key: zones[key]}):
            raise Violation(f"{key}: memory of the input or around it was written to")
    trial.judge(results)


@conformance_property(frameworks=("torch",), weight=0.25)
def test_same_pointer_new_data(trial: Trial) -> None:
    """New values at the same addresses give the new result: nothing is cached by pointer or shape."""
    inputs, other = trial.inputs(), trial.case.replace(seed=trial.case.seed + 1)
    trial.run(inputs)
    for key, tensor in trial.inputs(other).items():
        inputs[key].copy_(tensor)
    trial.judge(trial.run(inputs, same_memory=True), other)
