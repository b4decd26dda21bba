"""Corner faults are made where they say, and caught."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import pytest
import torch

from gaugeblock.conformance.engine.calls import apply
from gaugeblock.conformance.engine.inputs.cases import make_inputs, options
from gaugeblock.conformance.engine.inputs.coverage import array, space
from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.conformance.selftest.corners import Corner, WrongInACorner, corners, drawn_corners, judge_corner
from gaugeblock.conformance.selftest.rates import RIGHT

EXPERTS = "experts.fused_swiglu"
# a call is one step; the seed has another name, averages and learning rates have none
OF_RUNS = {"num_steps", "run_seed", "ema", "rates"}
UNSEEN = {
    "train_image_diffusion.train_step": OF_RUNS,
    "train_image_diffusion.train_step_on_texts": OF_RUNS | {"model"},  # a config within the config
    "train_block_diffusion.train_step": {"model"},  # likewise
    "train_stable_diffusion.train_step": {"model", "schedule"},
}


@pytest.mark.parametrize("contract", RIGHT)
def test_every_class_that_a_call_shows_is_a_corner(contract: str) -> None:
    row = find_contract(contract)
    shown = {name for ((name, _),) in corners(row, 1)}
    assert {*space(row).names} - shown == UNSEEN.get(contract, set())


def test_a_kernel_is_wrong_in_its_corner_alone() -> None:
    row, classes = find_contract(EXPERTS), (("top_k", "2"), ("num_experts", "a power of two"))
    right, wrong = RIGHT[EXPERTS](), WrongInACorner(row, RIGHT[EXPERTS](), classes)
    differ = []
    for case in array(row, 2):
        made = make_inputs(row, case, "float32")
        out, other = (apply(row, each, made, options(row, case), torch.stack) for each in (right, wrong))
        assert torch.allclose(out["hidden_states_out"], other["hidden_states_out"], rtol=0.02, atol=0.02)
        differ.append(not torch.equal(out["hidden_states_out"], other["hidden_states_out"]))
        parameters = case.parameters
        count = parameters["num_experts"]
        assert differ[-1] == (parameters["top_k"] == 2 and count > 2 and count & (count - 1) == 0 and count < 256)
    assert any(differ) and not all(differ)


@pytest.mark.parametrize(
    "corner", [each for each in drawn_corners(RIGHT, 26, seed=1) if not each.contract.startswith("train")][::3], ids=str
)
def test_a_corner_fault_is_caught(corner: Corner) -> None:
    assert judge_corner(corner, RIGHT).caught
