"""The references against modules of public libraries, both in float64: every peer that is judged, outputs and gradients."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # transformers imports triton, which then decorates

import pytest
from agreement import assert_agree
from wide_floats import float32_is_float64

from gaugeblock.conformance.engine.budget.oracle import exact_inputs, reference_run
from gaugeblock.conformance.engine.inputs.cases import Case, cotangents, options
from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.conformance.selftest.variant import Variant, variants

ORACLES = [each for each in variants() if each.oracle]


@pytest.mark.parametrize("oracle", ORACLES, ids=[f"{each.contract}-{each.name}" for each in ORACLES])
def test_reference_is_the_public_module(oracle: Variant) -> None:
    contract = find_contract(oracle.contract)
    at_landmarks = [Case(**parameters, regime=contract.regimes[0].name) for parameters in contract.landmarks]
    met = [case for case in at_landmarks if oracle.fits(case)]
    assert met
    for case in met:
        arguments = exact_inputs(contract, case, "float32"), options(contract, case), cotangents(contract, case)
        ours = reference_run(contract, *arguments)
        with float32_is_float64():
            theirs = reference_run(contract, *arguments, oracle.candidate())
        assert_agree(ours, theirs, case)
