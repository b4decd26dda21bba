"""Properties: permuting the batch permutes the result; renaming experts changes nothing else."""

import torch

from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.properties import conformance_property
from gaugeblock.conformance.engine.trial import Trial
from gaugeblock.conformance.engine.vocabulary import Tensors


@conformance_property(weight=0.5)
def test_permutation_equivariance(trial: Trial) -> None:
    """Permuting the examples of a batch permutes the outputs."""
    batch, inputs = trial.contract.batch, trial.inputs()
    order = Draw(trial.case.seed).permutation(trial.case.parameters[batch])
    permuted = trial.run(trial.take(inputs, batch, order))
    trial.judge(trial.take(permuted, batch, order.argsort()))


@conformance_property(weight=0.5, requires=("relabel",))
def test_expert_relabelling(trial: Trial) -> None:
    """Experts renamed, together with their weights and ids, give the same result under the new names."""
    assert trial.contract.relabel is not None  # required
    order = trial.contract.relabel(Draw(trial.case.seed), trial.case.parameters)  # new expert e is old expert order[e]
    renamed = trial.take(trial.inputs(), "num_experts", order)
    results = trial.run(_rename(trial, renamed, order.argsort()))
    trial.judge(trial.take(_rename(trial, results, order), "num_experts", order.argsort()))


def _rename(trial: Trial, tensors: Tensors, names: torch.Tensor) -> Tensors:
    """Replaces each value that indexes experts by its new name."""
    specs = trial.contract.specs(trial.case.parameters)
    return {
        key: names.to(tensor.device)[tensor.to(torch.int64)] if specs[key].indexes == "num_experts" else tensor
        for key, tensor in tensors.items()
    }
