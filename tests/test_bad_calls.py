"""Bad calls that follow from a contract's signature are made without a line written for them."""

from dataclasses import replace

import pytest
import torch

from gaugeblock.conformance.engine.inputs.bad_calls import bad_calls
from gaugeblock.conformance.engine.inputs.cases import Case, make_inputs
from gaugeblock.conformance.engine.registry import find_contract


def made(name: str) -> dict[str, object]:
    """By name, the bad calls of a contract at its first landmark, without its own."""
    contract = replace(find_contract(name), rejections=())
    return {each.name: each for each in bad_calls(contract, contract.landmarks[0])}


def spoilt(name: str, which: str) -> dict[str, object]:
    contract = find_contract(name)
    inputs = make_inputs(contract, Case(**contract.landmarks[0], regime=contract.regimes[0].name), "float32")
    return inputs, made(name)[which].spoil(inputs)


@pytest.mark.parametrize(
    ("which", "key", "shape"),
    [
        ("topk_ids with a num_tokens of one more", "topk_ids", lambda shape: (shape[0] + 1, shape[1])),
        ("topk_ids with a num_tokens of one less", "topk_ids", lambda shape: (shape[0] - 1, shape[1])),
        ("w13 of a rank less", "w13", lambda shape: shape[1:]),
        ("w2 of a rank more", "w2", lambda shape: (1, *shape)),
    ],
)
def test_ranks_and_shared_sizes_are_spoilt(which, key, shape):
    inputs, changed = spoilt("experts.fused_swiglu", which)
    assert tuple(changed[key].shape) == shape(tuple(inputs[key].shape)) and changed[key].dtype == inputs[key].dtype


def test_of_an_empty_axis_there_can_be_one_more():
    contract = find_contract("sdar.sdar_cached")
    past = make_inputs(contract, Case(**contract.landmarks[1], regime="dithered"), "float32")["past_values"]
    longer = made("sdar.sdar_cached")["past_values with a num_past_tokens of one more"].spoil({"past_values": past})[
        "past_values"
    ]
    assert past.shape[3] == 0 and longer.shape == (*past.shape[:3], 1, past.shape[4])


def test_kinds_of_numbers_and_ids_are_spoilt():
    inputs, changed = spoilt("experts.fused_swiglu", "topk_ids of floating numbers")
    assert changed["topk_ids"].is_floating_point()
    experts = inputs["w13"].shape[0]
    assert spoilt("experts.fused_swiglu", "topk_ids with an id of num_experts")[1]["topk_ids"].unique().tolist() == [experts]
    assert spoilt("experts.fused_swiglu", "topk_ids with a negative id")[1]["topk_ids"].unique().tolist() == [-1]


def test_either_of_two_that_differ_may_be_named():
    assert made("experts.fused_swiglu")["w2 with a num_experts of one more"].names == ("w2", "w13")


def test_entries_of_a_state_dict_are_spoilt():
    names = made("moe_layers.mixtral_moe")
    for expected in ("no gate.weight", "experts.down_proj of integers", "gate.weight of another size", "an entry too many"):
        assert expected in names
    assert spoilt("moe_layers.mixtral_moe", "no gate.weight")[1] == {"state/gate.weight": None}


def test_entries_of_a_state_dict_are_tried_in_another_dtype_and_on_another_device():
    changed = spoilt("moe_layers.mixtral_moe", "experts.down_proj of another dtype")[1]
    assert changed["state/experts.down_proj"].dtype == torch.float16  # of float32
    elsewhere = [each.elsewhere for each in made("moe_layers.mixtral_moe").values() if each.elsewhere]
    assert elsewhere == ["hidden_states", "state/experts.down_proj", "state/gate.weight"]


def test_all_but_the_first_argument_are_tried_on_another_device():
    elsewhere = [each.elsewhere for each in made("experts.fused_swiglu").values() if each.elsewhere]
    assert elsewhere == [spec.name for spec in find_contract("experts.fused_swiglu").inputs[1:]]


def test_the_steps_of_a_recurrence_are_left_alone():
    _, changed = spoilt("train_image_diffusion.train_step", "images of a rank less")
    inputs, _ = spoilt("train_image_diffusion.train_step", "images of a rank more")
    assert changed["images"].shape == (inputs["images"].shape[0], *inputs["images"].shape[2:])
