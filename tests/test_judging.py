"""The numbers in `conformance/JUDGING.md` are those of the code, and what it says of precision is measured again."""

import ast
import importlib
import math
import re
from pathlib import Path

import pytest
import torch

from gaugeblock.conformance.engine.budget.error_budget import Errors, measure
from gaugeblock.conformance.engine.budget.oracle import budgets
from gaugeblock.conformance.engine.frameworks import Call, call_torch
from gaugeblock.conformance.engine.inputs.cases import Case, make_inputs, options
from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.conformance.selftest.fault import faults
from gaugeblock.conformance.selftest.variant import variants

DOCUMENT = (Path(__file__).parents[1] / "conformance" / "JUDGING.md").read_text()
CONSTANTS = re.findall(r"^\| `(\w+)` \| ([\d.*-]+) \| `([\w/]+)\.py` \| (\d+) \|$", DOCUMENT, re.MULTILINE)
PRECISION = re.findall(r"^\| (.+) \| (strict|eager) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", DOCUMENT, re.MULTILINE)
EXPERTS = find_contract("experts.fused_swiglu")
OUT, DTYPE = "hidden_states_out", "bfloat16"


def test_the_document_has_both_tables():
    assert len(CONSTANTS) >= 10 and len(PRECISION) >= 8


@pytest.mark.parametrize(("name", "value", "file", "section"), CONSTANTS, ids=[each[0] for each in CONSTANTS])
def test_constants_are_those_of_the_code(name: str, value: str, file: str, section: str):
    module = importlib.import_module(f"gaugeblock.conformance.engine.{file.replace('/', '.')}")
    base, _, exponent = value.partition("**")
    assert getattr(module, name) == ast.literal_eval(base) ** ast.literal_eval(exponent or "1")
    text = re.search(rf"^## {section}\. .*?(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert text and value.replace("**", "^") in re.findall(r"\d[\d.^-]*\d|\d", text[0]), "the section says why"


def limits_of_experts(name: str, rounding: str) -> tuple[float, float, float, float]:
    """The worst error in σ, rms and bias over the landmarks together, and the worst statistic of one, of its limit."""
    candidates = {each.name: each.candidate for each in (*variants(), *faults()) if each.contract == EXPERTS.name}
    together, worst = Errors(), 0.0
    for seed, sizes in enumerate(EXPERTS.landmarks):
        case = Case(**sizes, regime="dithered", seed=seed)
        call = Call(make_inputs(EXPERTS, case, DTYPE), options(EXPERTS, case))
        result = call_torch(EXPERTS, candidates[name](), call)[OUT]
        errors = measure(result, budgets(EXPERTS, case, DTYPE, rounding)[OUT], torch.bfloat16, pooled=True)
        together, worst = together + errors, max(worst, errors.statistics().worst)
    elements = together.elements
    return 10 * together.worst, math.sqrt(together.squares / elements), abs(together.signed) / elements, worst


def test_precision_of_the_experts_is_as_told():
    name = ""
    for told, rounding, *figures in PRECISION:
        name = found[0] if (found := re.findall(r"`([\w-]+)`", told)) else name  # else the same, claiming otherwise
        measured = limits_of_experts(name, rounding)
        # sums in another order, on another machine, change the digits that are not printed, and the last of those
        assert measured == pytest.approx(tuple(map(float, figures)), rel=0.05, abs=0.02), (told, rounding)
        is_right = "right" in told
        assert (measured[3] < 1) == is_right, (told, rounding)
