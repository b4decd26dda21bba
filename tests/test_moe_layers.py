"""MoE layers and their losses against transformers' own, against their twins, and by themselves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_references import (
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_EXPERTS,
    NUM_TOKENS,
    TOP_K,
    assert_all_equal_to_rounding,
    assert_equal_to_rounding,
    float32_as_float64,
    jax_value_and_grads,
    random,
    value_and_grads,
    with_random_weights,
)
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from gaugeblock.optimized.jax import moe_layers as optimized_jax_moe_layers
from gaugeblock.optimized.triton import auxiliary_losses as triton_losses
from gaugeblock.optimized.triton import moe_layers as triton_moe_layers
from gaugeblock.reference import validation
from gaugeblock.reference.jax import auxiliary_losses as jax_losses
from gaugeblock.reference.jax import moe_layers as jax_moe_layers
from gaugeblock.reference.torch import auxiliary_losses, moe_layers

NAMES = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
MASK = torch.arange(NUM_TOKENS) % 5 != 1


def mixtral_arrays(dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return hidden_states and the entries of the state, and a cotangent of outputs and logits side by side."""
    sizes = [
        (NUM_TOKENS, HIDDEN_SIZE),
        (NUM_EXPERTS, HIDDEN_SIZE),
        (NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE),
        (NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE),
    ]
    arrays = [random(*size, seed=seed, dtype=dtype) for seed, size in enumerate(sizes)]
    return arrays, random(NUM_TOKENS, HIDDEN_SIZE + NUM_EXPERTS, seed=4, dtype=dtype)


def losses_of(module, ids, mask):
    """Return a function of the logits alone for each of the two losses."""
    return [
        lambda logits: module.load_balancing_loss(logits, ids, mask),
        lambda logits: module.router_z_loss(logits, mask),
    ]


def logits_and_ids(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    logits = 2 * random(NUM_TOKENS, NUM_EXPERTS, seed=0, dtype=dtype)
    return logits, logits.topk(TOP_K).indices


def test_mixtral_moe_is_the_block_of_transformers():
    config = MixtralConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    block = with_random_weights(MixtralSparseMoeBlock(config))
    ids = {}

    def ours(hidden_states, *weights):
        state = dict(zip(NAMES, weights, strict=True))
        out, logits, ids["ours"] = moe_layers.mixtral_moe(hidden_states, state, top_k=TOP_K)
        return torch.cat([out, logits], dim=1)

    def theirs(hidden_states, *weights):
        state = dict(zip(NAMES, weights, strict=True))
        out = torch.func.functional_call(block, state, hidden_states[None])[0]
        logits, _, ids["theirs"] = torch.func.functional_call(block.gate, {"weight": weights[0]}, hidden_states)
        return torch.cat([out, logits], dim=1)

    assert sorted(block.state_dict()) == sorted(NAMES)
    arrays = [random(NUM_TOKENS, HIDDEN_SIZE, seed=10), *(block.get_parameter(name) for name in NAMES)]
    cotangent = random(NUM_TOKENS, HIDDEN_SIZE + NUM_EXPERTS, seed=11)
    with float32_as_float64():
        expected = value_and_grads(theirs, arrays, cotangent)
    assert_all_equal_to_rounding(value_and_grads(ours, arrays, cotangent), expected)
    assert torch.equal(ids["ours"], ids["theirs"])


@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK)], ids=["padded", "not padded"])
def test_load_balancing_loss_is_that_of_transformers_for_one_assignment(mask):
    logits, ids = logits_and_ids(torch.float64)

    def theirs(logits):
        return load_balancing_loss_func((logits,), NUM_EXPERTS, TOP_K, mask[None]) / TOP_K

    cotangent = random(seed=1)
    with float32_as_float64():
        expected = value_and_grads(theirs, [logits], cotangent)
    ours, _ = losses_of(auxiliary_losses, ids, mask)
    assert_all_equal_to_rounding(value_and_grads(ours, [logits], cotangent), expected)


def test_router_z_loss_is_that_of_transformers_over_unmasked_tokens():
    logits, ids = logits_and_ids(torch.float64)
    _, ours = losses_of(auxiliary_losses, ids, MASK)
    expected = value_and_grads(lambda logits: router_z_loss_func(logits[None, MASK]), [logits], random(seed=1))
    assert_all_equal_to_rounding(value_and_grads(ours, [logits], random(seed=1)), expected)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    "jax_function",
    [jax.jit(jax_moe_layers.mixtral_moe, static_argnames="top_k"), optimized_jax_moe_layers.mixtral_moe],
    ids=["reference", "optimized"],
)
def test_jax_mixtral_moe_is_that_of_torch(jax_function, x64):
    arrays, cotangent = mixtral_arrays(torch.float64 if x64 else torch.float32)

    def ours(function, concatenate):
        def call(hidden_states, *weights):
            out, logits, _ = function(hidden_states, dict(zip(NAMES, weights, strict=True)), top_k=TOP_K)
            return concatenate([out, logits], 1)

        return call

    expected = value_and_grads(ours(moe_layers.mixtral_moe, torch.cat), arrays, cotangent)
    with jax.enable_x64(x64):
        actual = jax_value_and_grads(ours(jax_function, jnp.concatenate), arrays, cotangent)
        assert_all_equal_to_rounding(actual, expected)


@pytest.mark.parametrize("x64", [False, True])
def test_jax_losses_are_those_of_torch(x64):
    dtype = torch.float64 if x64 else torch.float32
    logits, ids = logits_and_ids(dtype)
    cotangent = random(seed=1, dtype=dtype)
    with jax.enable_x64(x64):
        twins = losses_of(jax_losses, jnp.asarray(ids.numpy()), jnp.asarray(MASK.numpy()))
        for jax_loss, torch_loss in zip(twins, losses_of(auxiliary_losses, ids, MASK), strict=True):
            expected = value_and_grads(torch_loss, [logits], cotangent)
            assert_all_equal_to_rounding(jax_value_and_grads(jax.jit(jax_loss), [logits], cotangent), expected)


def test_triton_losses_in_float64_are_those_of_torch():
    logits, ids = logits_and_ids(torch.float64)
    ours, expected = losses_of(triton_losses, ids, MASK), losses_of(auxiliary_losses, ids, MASK)
    for triton_loss, torch_loss in zip(ours, expected, strict=True):
        cotangent = random(seed=1)
        assert_all_equal_to_rounding(
            value_and_grads(triton_loss, [logits], cotangent), value_and_grads(torch_loss, [logits], cotangent)
        )


def test_load_balancing_loss_is_one_for_equal_loads_and_largest_where_all_tokens_agree():
    ids = torch.arange(NUM_TOKENS * TOP_K).reshape(NUM_TOKENS, TOP_K)[: NUM_EXPERTS // TOP_K] % NUM_EXPERTS
    mask = torch.ones(len(ids), dtype=torch.bool)
    balanced = auxiliary_losses.load_balancing_loss(random(len(ids), NUM_EXPERTS, seed=0), ids, mask)
    assert_equal_to_rounding(balanced, torch.ones((), dtype=torch.float64))
    certain = torch.zeros(len(ids), NUM_EXPERTS, dtype=torch.float64)
    certain[:, 5] = 1000
    worst = auxiliary_losses.load_balancing_loss(certain, torch.full_like(ids[:, :1], 5), mask)
    assert worst == NUM_EXPERTS


LOSSES = [auxiliary_losses, triton_losses, jax_losses]
LAYERS = [moe_layers, triton_moe_layers, jax_moe_layers]


def on(module, tensor: torch.Tensor):
    """Return a tensor as an array of the module's framework."""
    return tensor.clone() if "jax" not in module.__name__ else jnp.asarray(tensor.numpy())


def value_and_grads_of(module, loss, logits: torch.Tensor) -> list:
    function = value_and_grads if "jax" not in module.__name__ else jax_value_and_grads
    return function(loss, [logits], torch.ones(()))


@pytest.mark.parametrize("module", LOSSES, ids=lambda module: module.__name__.removeprefix("gaugeblock."))
def test_losses_see_nothing_of_padding_not_even_nan(module):
    logits, ids = logits_and_ids(torch.float32)
    spoilt = logits.masked_fill(~MASK[:, None], torch.nan)
    spoilt[1] = torch.inf
    for loss in losses_of(module, on(module, ids), on(module, MASK)):
        clean, dirty = (value_and_grads_of(module, loss, each) for each in (logits, spoilt))
        np.testing.assert_array_equal(dirty[0], clean[0])
        np.testing.assert_array_equal(dirty[1], clean[1])
        assert not np.asarray(dirty[1])[~MASK].any()


@pytest.mark.parametrize("num_tokens", [0, NUM_TOKENS])
@pytest.mark.parametrize("module", LOSSES, ids=lambda module: module.__name__.removeprefix("gaugeblock."))
def test_losses_of_no_tokens_are_zero_with_zero_gradient(module, num_tokens):
    logits, ids = (tensor[:num_tokens] for tensor in logits_and_ids(torch.float32))
    for loss in losses_of(module, on(module, ids), on(module, torch.zeros(num_tokens, dtype=torch.bool))):
        value, gradient = value_and_grads_of(module, loss, logits)
        assert value == 0 and np.asarray(gradient).shape == logits.shape and not np.asarray(gradient).any()


STATE = {
    "gate.weight": torch.zeros(6, 4),
    "experts.gate_up_proj": torch.zeros(6, 10, 4),
    "experts.down_proj": torch.zeros(6, 4, 5),
}
VALID = {
    "mixtral_moe": {"hidden_states": torch.zeros(8, 4), "state": STATE, "top_k": 2},
    "load_balancing_loss": {
        "router_logits": torch.zeros(8, 6),
        "topk_ids": torch.zeros(8, 2, dtype=torch.int64),
        "attention_mask": torch.ones(8, dtype=torch.bool),
    },
    "router_z_loss": {"router_logits": torch.zeros(8, 6), "attention_mask": torch.ones(8, dtype=torch.bool)},
}


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in STATE.items() if key != name}


@pytest.mark.parametrize("realm", [0, 1, 2], ids=["torch", "triton", "jax"])
@pytest.mark.parametrize(
    ("function", "argument", "bad", "error", "message"),
    [
        ("mixtral_moe", "hidden_states", torch.zeros(8), ValueError, "[num_tokens, hidden_size], got (8,)"),
        ("mixtral_moe", "hidden_states", torch.zeros(8, 4).int(), TypeError, "got int32"),
        ("mixtral_moe", "top_k", 7, ValueError, "1..num_experts=6, got 7"),
        ("mixtral_moe", "top_k", 0, ValueError, "1..num_experts=6, got 0"),
        ("mixtral_moe", "state", [torch.zeros(6, 4)], TypeError, "a dict of arrays, got list"),
        ("mixtral_moe", "state", without("gate.weight"), ValueError, "have gate.weight, got none"),
        ("mixtral_moe", "state", STATE | {"w2": torch.zeros(1)}, ValueError, "no other entries, got w2"),
        ("mixtral_moe", "state", STATE | {"gate.weight": torch.zeros(6, 3)}, ValueError, "hidden_size=4], got (6, 3)"),
        ("mixtral_moe", "state", STATE | {"gate.weight": torch.zeros(6, 4).half()}, TypeError, "float32, got float16"),
        ("mixtral_moe", "state", STATE | {"gate.weight": None}, TypeError, "an array, got NoneType"),
        (
            "mixtral_moe",
            "state",
            STATE | {"experts.gate_up_proj": torch.zeros(6, 9, 4)},
            ValueError,
            "[num_experts=6, two_intermediate_sizes=10, hidden_size=4], got (6, 9, 4)",
        ),
        (
            "mixtral_moe",
            "state",
            STATE | {"experts.down_proj": torch.zeros(5, 4, 5)},
            ValueError,
            "[num_experts=6, hidden_size=4, intermediate_size], got (5, 4, 5)",
        ),
        ("load_balancing_loss", "router_logits", torch.zeros(6), ValueError, "[num_tokens, num_experts], got (6,)"),
        ("load_balancing_loss", "router_logits", torch.zeros(8, 6).int(), TypeError, "got int32"),
        ("load_balancing_loss", "router_logits", torch.zeros(8, 0), ValueError, "at least one expert, got (8, 0)"),
        ("load_balancing_loss", "topk_ids", torch.zeros(7, 2).int(), ValueError, "[num_tokens=8, top_k], got (7, 2)"),
        ("load_balancing_loss", "topk_ids", torch.zeros(8, 0).int(), ValueError, "expert per token, got (8, 0)"),
        ("load_balancing_loss", "topk_ids", torch.zeros(8, 2), TypeError, "got float32"),
        ("load_balancing_loss", "topk_ids", torch.full((8, 2), 6), ValueError, "in 0..5, got 6..6"),
        ("load_balancing_loss", "attention_mask", torch.ones(8), TypeError, "bool, got float32"),
        ("router_z_loss", "attention_mask", torch.ones(7).bool(), ValueError, "[num_tokens=8], got (7,)"),
        ("router_z_loss", "attention_mask", torch.ones(8).int(), TypeError, "bool, got int32"),
        ("router_z_loss", "router_logits", torch.zeros(8, 6).bool(), TypeError, "got bool"),
    ],
)
def test_a_bad_call_names_its_argument(realm, function, argument, bad, error, message):
    module = (LAYERS if function == "mixtral_moe" else LOSSES)[realm]

    def converted(value):
        if isinstance(value, dict):
            return {name: converted(entry) for name, entry in value.items()}
        return on(module, value) if isinstance(value, torch.Tensor) else value

    call = converted(VALID[function] | {argument: bad})
    with pytest.raises(error, match=f"^{argument}.* must .*{re.escape(message)}"):
        getattr(module, function)(**call)


def test_a_rank_holds_its_part_of_the_experts():
    tokens, part = torch.zeros(8, 4), {name: each if name == "gate.weight" else each[:3] for name, each in STATE.items()}
    validation.mixtral_moe(tokens, part, 2, num_holders=2)
    with pytest.raises(ValueError, match=r"must be \[num_experts=3, .*, got \(6, "):
        validation.mixtral_moe(tokens, STATE, 2, num_holders=2)
    with pytest.raises(ValueError, match=r"^num_experts must be a multiple of the ranks \(4\), got 6"):
        validation.mixtral_moe(tokens, part, 2, num_holders=4)


def test_state_on_another_device_is_rejected():
    state = STATE | {"experts.down_proj": torch.zeros(6, 4, 5, device="meta")}
    with pytest.raises(ValueError, match=r"^state\['experts.down_proj'\] must be on the device of hidden_states"):
        moe_layers.mixtral_moe(torch.zeros(8, 4), state, top_k=2)
