"""Properties at the edges: an empty batch, one example, an example of NaN."""

import torch

from gaugeblock.conformance.engine.properties import conformance_property
from gaugeblock.conformance.engine.trial import Trial


@conformance_property(weight=0.25)
def test_empty_and_one(trial: Trial) -> None:
    """An empty batch gives empty outputs and zero gradients; a batch of one is an ordinary one."""
    for length in (0, 1):
        case = trial.case.replace(**{trial.contract.batch: length})
        trial.judge(trial.run(case=case, gradients=trial.implementation.differentiable and length == 0), case)


@conformance_property(needs=("deterministic",), weight=0.5)
def test_nan_containment(trial: Trial) -> None:
    """An example of NaN changes no bit of the other examples' results."""
    batch, inputs = trial.contract.batch, trial.inputs()
    length = trial.case.parameters[batch]
    poisoned, others = (
        length // 2,
        torch.tensor([row for row in range(length) if row != length // 2], dtype=torch.int64),
    )
    # a row of NaN may be routed elsewhere, and torch's bits depend on how many rows it multiplies
    clean = trial.run(inputs, library_in_float64=True)
    for key, tensor in inputs.items():
        spec = trial.contract.spec(key, trial.case.parameters)
        if spec.differentiable and batch in spec.shape:
            tensor.select(spec.shape.index(batch), poisoned).fill_(torch.nan)
    dirty = trial.run(inputs, library_in_float64=True)
    trial.same_bits(
        trial.examples(dirty, others),
        trial.examples(clean, others),
        f"where one of the {batch} is NaN",
    )
