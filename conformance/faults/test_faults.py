"""Every planted bug is caught by the property that it names, and right kernels pass every property."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

from dataclasses import replace

import pytest

from gaugeblock.conformance.faults.fault import KINDS, Fault, faults, process_kept
from gaugeblock.conformance.faults.mutants import mutated
from gaugeblock.conformance.faults.simulated import RIGHT
from gaugeblock.conformance.properties import properties
from gaugeblock.conformance.registry import Implementation
from gaugeblock.conformance.trial import PROFILES, Subject, examine

QUICK = replace(PROFILES["quick"], shrink_seconds=0)  # whether it fails, not how small a case does


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: f"{fault.contract}-{fault.name}")
def test_fault_is_caught_by_its_property(fault: Fault) -> None:
    with process_kept():
        verdict = examine(fault.subject(), properties()[fault.caught_by], QUICK)
    assert verdict.status == "fail", f"{verdict.status} after {verdict.cases} cases: {fault.summary} {verdict.reason}"


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("contract", RIGHT)
def test_the_same_kernel_without_a_fault_passes_every_property(contract: str, dtype: str) -> None:
    for prop in properties().values():
        subject = Subject(Implementation(contract, "right", RIGHT[contract]()), dtype, "cpu")
        verdict = examine(subject, prop, QUICK)
        assert verdict.status in ("pass", "warning", "not supported"), f"{prop.name}: {verdict.reason}"


def test_faults_are_of_every_kind() -> None:
    assert {fault.kind for fault in faults()} == set(KINDS)


def test_every_property_catches_a_fault() -> None:
    assert {fault.caught_by for fault in faults()} == set(properties())


def test_a_mutation_that_changes_nothing_is_refused() -> None:
    assert mutated("A = 1\ndef f():\n    return A < 1\n", "f", "<", "<=") == "A = 1\ndef f():\n    return A <= 1\n"
    for place, old in (("f", "mask"), ("g", "<"), ("A", "<")):
        with pytest.raises(ValueError, match=place):
            mutated("A = 1\ndef f():\n    return A < 1\n", place, old, "")
