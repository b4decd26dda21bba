"""The references against modules of public libraries, both in float64: every peer that is judged, outputs and gradients."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # transformers imports triton, which then decorates

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from agreement import assert_agree

from gaugeblock.conformance.engine.budget.oracle import exact_inputs, reference_run
from gaugeblock.conformance.engine.inputs.cases import Case, cotangents, options
from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.conformance.selftest.variant import Variant, variants

ORACLES = [each for each in variants() if each.oracle]


@contextmanager
def float32_is_float64() -> Iterator[None]:
    """Makes modules that cast to float32 whatever they are given compute in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


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
