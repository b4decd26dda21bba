"""Llama 4's layer by a worked example."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
import torch
from test_references import assert_equal_to_rounding

from gaugeblock.reference.jax import moe_building as jax_moe_building
from gaugeblock.reference.torch import input_scaled_moe_layers, moe_building

STATE = {
    "router.weight": torch.tensor([[0.0], [math.log(3)], [-1.0]], dtype=torch.float64),
    "experts.gate_up_proj": torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]], [[7.0, 7.0]]], dtype=torch.float64),  # [E, H, 2I]
    "experts.down_proj": torch.tensor([2.0, 4.0, 7.0], dtype=torch.float64)[:, None, None],
    "shared_expert.gate_proj.weight": torch.tensor([[1.0]], dtype=torch.float64),
    "shared_expert.up_proj.weight": torch.tensor([[1.0]], dtype=torch.float64),
    "shared_expert.down_proj.weight": torch.tensor([[1.0]], dtype=torch.float64),
}


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


@pytest.mark.parametrize("top_k", [1, 2])
def test_worked_example(top_k):
    """A token of 1: the sigmoid of log 3 is 3/4, that of 0 is 1/2, and both meet the token before the experts do."""
    out, logits, ids = input_scaled_moe_layers.llama4_moe(torch.ones(1, 1, dtype=torch.float64), STATE, top_k=top_k)
    best, second, shared = 4 * silu(3 * 0.75) * 5 * 0.75, 2 * silu(1 * 0.5) * 2 * 0.5, silu(1)
    assert ids.tolist() == [[1, 0][:top_k]]
    assert_equal_to_rounding(out, [[best + (second if top_k == 2 else 0) + shared]])
    assert logits[0, 1].item() == math.log(3)


# of one expert and one token, which times its weight is no number of bfloat16
RUNNER_CALL: dict[str, list[Any]] = {
    "hidden_states": [[1 + 2**-7]],
    "w13": [[[3.0], [5.0]]],
    "w2": [[[4.0]]],
    "topk_weights": [[0.75]],
    "topk_ids": [[0]],
}
REALMS = {
    "torch": (moe_building.input_scaled_swiglu, torch.tensor, {"bfloat16": torch.bfloat16, "float32": torch.float32}),
    "jax": (jax_moe_building.input_scaled_swiglu, jnp.asarray, {"bfloat16": jnp.bfloat16, "float32": jnp.float32}),
}


def runner_call(realm: str, dtype: str, **changed: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The runner of a realm, and its arguments, of which some have other values or another dtype."""
    runner, array, dtypes = REALMS[realm]
    kinds = {name: dtypes[dtype] for name in ("hidden_states", "w13", "w2")} | {"topk_weights": dtypes["float32"]}
    kinds |= {name: dtypes[each] for name, each in changed.items() if isinstance(each, str)}
    values = RUNNER_CALL | {name: each for name, each in changed.items() if not isinstance(each, str)}
    return runner, {name: array(value, dtype=kinds.get(name)) for name, value in values.items()}


@pytest.mark.parametrize("realm", REALMS)
@pytest.mark.parametrize("of_weights", ["float32", "bfloat16"])
def test_a_runner_of_scaled_tokens_computes_in_float32_and_rounds_once(realm, of_weights):
    runner, call = runner_call(realm, "bfloat16", topk_weights=of_weights)
    out, scaled = runner(**call), 0.75 * (1 + 2**-7)
    expected = 4 * silu(3 * scaled) * 5 * scaled
    assert out.dtype == call["hidden_states"].dtype
    assert out.item() == torch.tensor(expected).bfloat16().item()


@pytest.mark.parametrize("realm", REALMS)
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"w13": "bfloat16"}, TypeError, "w13 must be float32, got bfloat16"),
        ({"w2": "bfloat16"}, TypeError, "w2 must be float32, got bfloat16"),
        ({"topk_weights": [[0.75, 0.5]]}, ValueError, r"topk_weights must be \[num_tokens=1, top_k=1\], got \(1, 2\)"),
        ({"topk_ids": [[1]]}, ValueError, "topk_ids must be in 0..0, got 1..1"),
    ],
)
def test_a_bad_call_of_a_runner_of_scaled_tokens_names_its_argument(realm, changed, error, message):
    runner, call = runner_call(realm, "float32", **changed)
    with pytest.raises(error, match=message):
        runner(**call)
