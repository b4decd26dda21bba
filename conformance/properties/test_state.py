"""Properties of what is carried in state dicts: parameters, and the state of a training run."""

import safetensors.torch
import torch

from gaugeblock.conformance.engine.calls import argument_of
from gaugeblock.conformance.engine.properties import conformance_property
from gaugeblock.conformance.engine.trial import Trial
from gaugeblock.conformance.engine.vocabulary import Tensors


@conformance_property(requires=("state",), needs=("deterministic",), weight=0.25)
def test_state_dict_round_trip(trial: Trial) -> None:
    """A state dict that was saved and loaded (safetensors), its entries in another order, gives the same bits."""
    inputs = trial.inputs()
    assert trial.contract.state is not None  # required
    state = {key: tensor for key, tensor in inputs.items() if argument_of(key) == trial.contract.state.name}
    others = {key: tensor for key, tensor in inputs.items() if key not in state}
    loaded = _saved_and_loaded(trial, state)
    expected = trial.run(inputs)
    reordered = others | {key: loaded[key] for key in reversed(state)}
    trial.same_bits(trial.run(reordered), expected, "when the state dict was saved and loaded")


@conformance_property(requires=("recurrence",), needs=("deterministic",), weight=0.5)
def test_resume(trial: Trial) -> None:
    """Several steps are right; interrupted, saved and, after another run, loaded and resumed, they give the same bits."""
    recurrence = trial.contract.recurrence
    assert recurrence is not None  # required
    case = trial.case.replace(**{recurrence.steps: max(2, trial.case.parameters[recurrence.steps])})
    steps, half = case.parameters[recurrence.steps], case.parameters[recurrence.steps] // 2
    inputs = trial.inputs(case)
    through = trial.run(inputs, case=case)
    trial.judge(through, case)
    first = trial.run(trial.take(inputs, recurrence.steps, torch.arange(half)), case=case)
    trial.run(case=case.replace(seed=case.seed + 1))
    rest = trial.take(inputs, recurrence.steps, torch.arange(half, steps))
    for given, returned in recurrence.carried.items():
        state = {key.replace(returned, given, 1): tensor for key, tensor in first.items() if argument_of(key) == returned}
        rest |= _saved_and_loaded(trial, state)
    expected = {
        key: tensor if argument_of(key) in recurrence.carried.values() else tensor[half:] for key, tensor in through.items()
    }
    trial.same_bits(trial.run(rest, case=case), expected, "when the run was interrupted and resumed")


@conformance_property(requires=("microbatches",), weight=0.5)
def test_accumulation(trial: Trial) -> None:
    """In how many microbatches a batch is processed does not matter, though they are of unequal size."""
    name, batch = trial.contract.microbatches, trial.contract.batch
    assert name is not None  # required
    whole = trial.case.replace(**{name: 1, batch: trial.case.parameters[batch] // 2 * 2 + 3})
    trial.judge(trial.run(trial.inputs(whole), case=whole.replace(**{name: 2})), whole)


def _saved_and_loaded(trial: Trial, state: Tensors) -> Tensors:
    loaded = safetensors.torch.load(safetensors.torch.save({key: tensor.cpu().contiguous() for key, tensor in state.items()}))
    return dict(loaded)
