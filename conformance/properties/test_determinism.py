"""Property: run-to-run determinism."""

from gaugeblock.conformance.engine.properties import conformance_property
from gaugeblock.conformance.engine.trial import Trial


@conformance_property(needs=("deterministic",), weight=0.25, covers=2)
def test_determinism(trial: Trial) -> None:
    """The same call gives the same bits, three times (of our models, twice), forward and backward."""
    first = trial.run(gradients=trial.implementation.differentiable)
    for _ in range(1 if trial.sparing else 2):
        trial.same_bits(trial.run(gradients=trial.implementation.differentiable), first, "between runs of the same call")
