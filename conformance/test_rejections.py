"""Property: bad calls are rejected."""

from contextlib import suppress

from gaugeblock.conformance.contract import argument_of
from gaugeblock.conformance.frameworks import BadResult, Call
from gaugeblock.conformance.judge import Violation
from gaugeblock.conformance.properties import conformance_property
from gaugeblock.conformance.registry import one_line
from gaugeblock.conformance.trial import Trial


@conformance_property(needs=("validates",), weight=0.01)
def test_rejections(trial: Trial) -> None:
    """Each bad call raises ValueError or TypeError that names the argument, writes nothing, and the next call works."""
    for rejection in trial.contract.rejections:
        inputs, options = trial.inputs(), trial.options()
        spoilt = rejection.spoil(inputs | options)
        bad_inputs = {key: spoilt.get(key, tensor) for key, tensor in inputs.items()}
        bad_options = {name: spoilt.get(name, value) for name, value in options.items()}
        expected = f"expected ValueError or TypeError naming {rejection.argument}"
        try:
            with suppress(BadResult):  # whatever came back, the call was accepted
                trial.call(Call(bad_inputs, bad_options))
        except (ValueError, TypeError) as error:
            if rejection.argument not in str(error):
                raise Violation(f"{rejection.name}: the error does not name {rejection.argument}: {one_line(error)}") from None
        except Exception as error:
            raise Violation(f"{rejection.name}: raised {type(error).__name__}, {expected}: {one_line(error)}") from None
        else:
            raise Violation(f"{rejection.name}: accepted, {expected}")
        untouched = {key: tensor for key, tensor in trial.inputs().items() if argument_of(key) not in spoilt}
        trial.same_bits(inputs, untouched, f"after the rejected call ({rejection.name}): an input was written to")
    trial.judge(trial.run())
