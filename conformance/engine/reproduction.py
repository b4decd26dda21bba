"""Runs failing cases again: those of a script, or of the JSON file that a report holds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gaugeblock.conformance.engine.devices import available_devices, set_up_process
from gaugeblock.conformance.engine.exploration import check, pooled_violation
from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.processes.loading import describe_candidates
from gaugeblock.conformance.engine.properties import find_property
from gaugeblock.conformance.engine.registry import RegistrationError, implementations
from gaugeblock.conformance.engine.trial import Ledger, Subject


def reproduce(
    *,
    source: str | None,
    contract: str,
    implementation: str,
    property: str,
    dtype: str,
    device: str,
    cases: Sequence[Case],
) -> None:
    """Runs a property on given cases again.

    Raises:
        Violation: As the gate did; returns quietly where the property holds now.
        RegistrationError: If the contract, the implementation or the property does not exist.
    """
    set_up_process()

    if source is not None:
        describe_candidates((source,))
    found = next((each for each in implementations(contract) if each.name == implementation), None)
    if found is None:
        raise RegistrationError(f"{contract}: no implementation named {implementation!r}")
    subject, ledger = Subject(found, dtype, device), Ledger()
    if device not in available_devices() or subject.untestable:
        raise RegistrationError(f"cannot be judged here: {subject.untestable or f'this machine has no {device}'}")
    for case in cases:
        violation = check(subject, find_property(property), case, ledger)
        if violation is not None:
            print("\n".join(filter(None, (repr(case), violation.diagnosis, *violation.details))))
            raise violation
        ledger.cases.append(case)
    violation = pooled_violation(ledger)
    if violation is not None:
        raise violation


def reproduce_file(path: Path) -> None:
    """Runs the failure again that a report wrote to `failures/*.json`.

    Raises:
        ValueError: If the file is not such a failure.
        Violation: As `reproduce`.
    """
    try:
        failure: dict[str, Any] = json.loads(path.read_text())
        cases = [Case(**each) for each in failure["cases"]]
        given = {name: failure[name] for name in ("source", "contract", "implementation", "property", "dtype", "device")}
        version = failure["format"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a failure written by gaugeblock check: {type(error).__name__}: {error}") from None
    if version != 1:
        raise ValueError(f"{path}: format {version!r}, expected 1")
    reproduce(**given, cases=cases)
