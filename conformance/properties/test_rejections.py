"""Property: bad calls are rejected."""

import zlib
from contextlib import suppress

from gaugeblock.conformance.engine.frameworks import BadResult, Call, Raised
from gaugeblock.conformance.engine.inputs.bad_calls import bad_calls
from gaugeblock.conformance.engine.judging.judge import Violation
from gaugeblock.conformance.engine.properties import conformance_property
from gaugeblock.conformance.engine.trial import Trial

OF_OURS = 3  # one in so many bad calls is made of a model of ours


@conformance_property(needs=("validates",), weight=0.01)
def test_rejections(trial: Trial) -> None:
    """Each bad call raises an error that names the argument (ValueError, TypeError, or what the contract says), writes nothing,
    and the next call works; values on a GPU are not looked at."""
    rejections = bad_calls(trial.contract, trial.case.parameters)
    if trial.sparing:  # all check arguments by the same functions; the reference makes every bad call, each other one some
        rejections = rejections[zlib.crc32(trial.implementation.name.encode()) % OF_OURS :: OF_OURS]
    for rejection in rejections:
        if rejection.elsewhere and (trial.implementation.framework == "jax" or trial.subject.on_ranks):
            continue  # who place arrays themselves
        if rejection.by_values and trial.subject.device != "cpu":
            continue
        inputs, options = trial.inputs(), trial.options()
        spoilt = rejection.spoil(inputs | options)
        bad_options = {name: spoilt.get(name, value) for name, value in options.items()}
        bad_inputs = inputs | {key: value for key, value in spoilt.items() if key not in options}
        bad_inputs = {key: value for key, value in bad_inputs.items() if value is not None}
        expected = f"expected {' or '.join(each.__name__ for each in rejection.raises)} naming {' or '.join(rejection.names)}"
        try:
            with suppress(BadResult):  # whatever came back, the call was accepted
                trial.call(Call(bad_inputs, bad_options), write_back=True, elsewhere=rejection.elsewhere)
        except Raised as error:
            if not {each.__name__ for each in rejection.raises} & set(error.kinds):
                raise Violation(f"{rejection.name}: {error}, {expected}", error.place) from None
            if not any(name in error.message for name in rejection.names):
                raise Violation(f"{rejection.name}: the error does not name {' or '.join(rejection.names)}: {error}") from None
        else:
            raise Violation(f"{rejection.name}: accepted, {expected}")
        untouched = {key: tensor for key, tensor in trial.inputs().items() if key not in spoilt}
        trial.same_bits(inputs, untouched, f"after the rejected call ({rejection.name}): an input was written to")
    trial.judge(trial.run())
