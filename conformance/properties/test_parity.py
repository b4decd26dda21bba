"""Property: parity with the oracle."""

from gaugeblock.conformance.engine.properties import conformance_property
from gaugeblock.conformance.engine.trial import Trial


@conformance_property(regimes="all", every_dtype=True, covers=2)
def test_parity(trial: Trial) -> None:
    """Every output lies within its error budget of the float64 oracle, in every regime."""
    results = trial.run()
    trial.judge(results)
    trial.fingerprint(results)
