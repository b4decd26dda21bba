"""Every planted bug is caught by the property that it names, and right kernels pass every property."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

from collections.abc import Iterable
from dataclasses import replace

import pytest

from gaugeblock.conformance.engine import exploration
from gaugeblock.conformance.engine.devices import split_cpu_for_jax
from gaugeblock.conformance.engine.exploration import PROFILES, examine
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.processes import ranks
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import contracts
from gaugeblock.conformance.engine.trial import Subject
from gaugeblock.conformance.selftest.edits import OfRanks, mutated
from gaugeblock.conformance.selftest.fault import KINDS, Fault, faults, process_kept
from gaugeblock.conformance.selftest.rates import CAUGHT, RIGHT
from gaugeblock.conformance.selftest.simulated.ranks import DataParallel, ExpertParallel
from gaugeblock.conformance.selftest.simulated.tensor_parallel import TensorParallel, TensorParallelMlp

split_cpu_for_jax()  # before JAX starts

QUICK = replace(PROFILES["quick"], shrink_seconds=0)  # whether it fails, not how small a case does
FEW = replace(QUICK, examples=1)  # right variants are judged on more in test_error_budget.py


@pytest.fixture
def sparingly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right is judged on as few cases as what is built in; `gaugeblock selftest` takes more."""
    monkeypatch.setattr(exploration, "is_built_in", lambda implementation: True)


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that wait for ever are given up sooner."""
    monkeypatch.setattr(ranks, "PATIENCE_SECONDS", 8.0)


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: f"{fault.contract}-{fault.name}")
def test_fault_is_caught_by_its_property(fault: Fault) -> None:
    with process_kept():
        verdict = examine(fault.subject(), properties()[fault.caught_by], QUICK)
    assert verdict.status in CAUGHT, f"{verdict.status} after {verdict.cases} cases: {fault.summary} {verdict.reason}"
    assert "ImportError" not in verdict.reason, verdict.reason  # a copy of the realm that cannot be loaded is no bug


@pytest.mark.parametrize(
    ("contract", "dtype"), [(name, dtype) for name in RIGHT for dtype in contracts()[name].dtypes if dtype != "float16"]
)
def test_the_same_kernel_without_a_fault_passes_every_property(sparingly: None, contract: str, dtype: str) -> None:
    # of models and steps, whose cases are dear, those that catch a fault in it: the others are judged of what it is made of
    caught_by = {fault.caught_by for fault in faults() if fault.contract == contract}
    names = caught_by if contracts()[contract].rigid else None
    assert_right(Implementation(contract, "right", RIGHT[contract]()), dtype, names)


@pytest.mark.parametrize(
    "implementation",
    [
        Implementation("experts.fused_swiglu", "right", ExpertParallel(), world_sizes=(1, 2)),
        Implementation("experts.fused_swiglu", "right", TensorParallel(), world_sizes=(1, 2), sharding="tensor_parallel"),
        Implementation("experts.fused_gelu_mlp", "right", TensorParallelMlp(), world_sizes=(1, 2), sharding="tensor_parallel"),
        Implementation("train_image_diffusion.train_step", "right", DataParallel(), world_sizes=(1, 2)),
    ],
    ids=lambda implementation: implementation.contract,
)
def test_the_same_ranks_without_a_fault_pass_every_property(sparingly: None, implementation: Implementation) -> None:
    caught_by = {fault.caught_by for fault in faults() if fault.claims.get("world_sizes")}
    assert_right(implementation, "float32", caught_by)


def assert_right(implementation: Implementation, dtype: str, names: Iterable[str] | None = None) -> None:
    for prop in [properties()[name] for name in names or properties()]:
        verdict = examine(Subject(implementation, dtype, "cpu"), prop, FEW)
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
    with pytest.raises(ValueError, match="no 'gone' in summed_linears"):  # before any rank runs
        OfRanks("distributed", "dit_tensor_parallel.dit", "name", "tensor_parallel.summed_linears", "gone", "")
