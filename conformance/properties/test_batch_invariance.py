"""Property: batch invariance."""

import torch

from gaugeblock.conformance.engine.properties import conformance_property
from gaugeblock.conformance.engine.trial import Trial


@conformance_property(needs=("batch_invariant", "deterministic"), frameworks=("torch",), weight=0.5, covers=2)
def test_batch_invariance(trial: Trial) -> None:
    """An example's bits do not depend on how many or which other examples are in the batch, nor on its place."""
    batch, inputs = trial.contract.batch, trial.inputs()
    length = trial.case.parameters[batch]
    whole = trial.run(inputs, library_in_float64=True)
    for chosen in (torch.tensor([0]), torch.tensor([length - 1]), torch.arange(length // 2, length).flip(0)):
        part = trial.run(trial.take(inputs, batch, chosen), library_in_float64=True)
        trial.same_bits(part, trial.examples(whole, chosen), f"when only {len(chosen)} of {length} {batch} are in the batch")
