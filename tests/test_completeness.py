"""A row is guarded like its neighbours: what follows from it is there, and what it needs beside it as well."""

from pathlib import Path

import pytest

from gaugeblock.conformance.engine.implementation import import_path
from gaugeblock.conformance.engine.inputs.bad_calls import bad_calls
from gaugeblock.conformance.engine.registry import contracts, implementations
from gaugeblock.conformance.selftest.variant import variants

ROOT = Path(__file__).parents[1]
ROWS = pytest.mark.parametrize("contract", contracts().values(), ids=lambda row: row.name)


@ROWS
def test_a_contract_has_another_right_way_to_write_it(contract):
    assert [each.name for each in variants() if each.contract == contract.name] != []


@ROWS
def test_a_contract_has_published_sizes_and_a_benchmark(contract):
    assert contract.workloads and all(each.source for each in contract.workloads)
    assert (ROOT / "benchmarks" / f"{contract.family}.py").exists()


@ROWS
def test_a_contract_says_what_to_visit_and_what_to_reject(contract):
    assert contract.factors and bad_calls(contract, contract.landmarks[0])
    kinds = {each.name for each in contract.regimes}
    assert contract.regimes[0].judged == "budget" and len(kinds) >= 2


@ROWS
def test_a_family_has_one_file_name_in_every_realm(contract):
    for realm in ("reference/torch", "reference/jax", "benchmarks"):
        assert (ROOT / realm / f"{contract.family}.py").exists()


@ROWS
def test_every_implementation_can_be_imported(contract):
    for each in implementations(contract.name):
        assert callable(import_path(each.function) if isinstance(each.function, str) else each.function)
