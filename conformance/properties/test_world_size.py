"""Property: world-size invariance."""

from gaugeblock.conformance.engine.properties import conformance_property
from gaugeblock.conformance.engine.shardings import fit
from gaugeblock.conformance.engine.trial import Trial


@conformance_property(needs=("world_sizes",), requires=("shardings",), weight=0.5, every_world_size=True, every_dtype=True)
def test_world_size(trial: Trial) -> None:
    """On every number of devices the result is the oracle's, also where devices have no part of the batch, if that may be."""
    size = trial.world_size
    few = trial.case.replace(**{trial.contract.batch: size - 1})
    few = few.replace(**fit(trial.subject.sharding, few.parameters, size))
    is_uneven = size > 1 and not (trial.sparing and size < max(trial.implementation.world_sizes))
    for case in dict.fromkeys((trial.case, few) if is_uneven else (trial.case,)):
        trial.judge(trial.run(case=case, gradients=trial.implementation.differentiable), case)
