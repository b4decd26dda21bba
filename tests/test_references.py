"""The references against transformers' own modules, against their twins, and by themselves."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # transformers imports triton, which then decorates

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from gaugeblock.optimized.jax import expert_calls
from gaugeblock.optimized.jax import experts as optimized_jax_experts
from gaugeblock.reference.jax import capacity_routers as jax_capacity_routers
from gaugeblock.reference.jax import experts as jax_experts
from gaugeblock.reference.jax import routers as jax_routers
from gaugeblock.reference.torch import capacity_routers, experts, routers

REFERENCE = Path(__file__).parent.parent / "reference"
NUM_TOKENS, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOP_K = 33, 24, 20, 12, 3
LONGEST_SUM = NUM_TOKENS * TOP_K  # of all products here: a weight's gradient when one expert gets every row


def assert_equal_to_rounding(actual, expected) -> None:
    """Differ by no more than two orders of adding up the longest sum may, each n units (Higham's gamma_n)."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    largest = np.abs(expected).max(initial=0)
    assert np.abs(actual - expected).max(initial=0) <= LONGEST_SUM * np.finfo(expected.dtype).eps * largest


def assert_all_equal_to_rounding(actual: list, expected: list) -> None:
    for one_actual, one_expected in zip(actual, expected, strict=True):
        assert_equal_to_rounding(one_actual, one_expected)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs_of_experts(dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return (hidden_states, w13, w2, topk_weights), topk_ids that leave an expert empty, and a cotangent."""
    sizes = [
        (NUM_TOKENS, HIDDEN_SIZE),
        (NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE),
        (NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE),
        (NUM_TOKENS, TOP_K),
    ]
    arrays = [random(*size, seed=seed, dtype=dtype) for seed, size in enumerate(sizes)]
    ids = torch.randint(1, NUM_EXPERTS, (NUM_TOKENS, TOP_K), generator=torch.Generator().manual_seed(4))
    return arrays, ids, random(NUM_TOKENS, HIDDEN_SIZE, seed=5, dtype=dtype)


def value_and_grads(function, arrays: list[torch.Tensor], cotangent: torch.Tensor) -> list[torch.Tensor]:
    arrays = [array.detach().requires_grad_() for array in arrays]
    value = function(*arrays)
    return [value.detach(), *torch.autograd.grad(value, arrays, cotangent)]


def jax_value_and_grads(function, arrays: list[torch.Tensor], cotangent: torch.Tensor) -> list[jax.Array]:
    value, pull_back = jax.vjp(function, *(jnp.asarray(array.numpy()) for array in arrays))
    return [value, *pull_back(jnp.asarray(cotangent.numpy()))]


@contextmanager
def float32_as_float64() -> Iterator[None]:
    """Let transformers' routers, which cast to float32 whatever they are given, compute in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def with_random_weights(module: torch.nn.Module) -> torch.nn.Module:
    for seed, tensor in enumerate((*module.parameters(), *module.buffers())):
        tensor.data = random(*tensor.shape, seed=seed)
    return module


SIZES = {"hidden_size": HIDDEN_SIZE, "num_experts_per_tok": TOP_K}
QWEN3 = {"num_experts": NUM_EXPERTS, "moe_intermediate_size": INTERMEDIATE_SIZE}


@pytest.mark.parametrize(
    ("block_class", "config", "renormalize"),
    [
        (MixtralSparseMoeBlock, MixtralConfig(num_local_experts=12, intermediate_size=20, **SIZES), True),
        (Qwen3MoeSparseMoeBlock, Qwen3MoeConfig(norm_topk_prob=True, **QWEN3, **SIZES), True),
        (Qwen3MoeSparseMoeBlock, Qwen3MoeConfig(norm_topk_prob=False, **QWEN3, **SIZES), False),
        (OlmoeSparseMoeBlock, OlmoeConfig(num_experts=12, intermediate_size=20, **SIZES), False),
    ],
    ids=["mixtral", "qwen3_moe", "qwen3_moe-not-renormalized", "olmoe"],
)
def test_softmax_topk_and_fused_swiglu_are_the_moe_block_of_transformers(block_class, config, renormalize):
    block = with_random_weights(block_class(config))
    names = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")

    def ours(hidden_states, gate, w13, w2):
        logits = hidden_states @ gate.T
        topk_weights, topk_ids = routers.softmax_topk(logits, top_k=TOP_K, renormalize=renormalize)
        return experts.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)

    def theirs(hidden_states, *weights):
        weights = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(block, weights, hidden_states[None])[0]

    arrays = [random(NUM_TOKENS, HIDDEN_SIZE, seed=10), *(block.get_parameter(name) for name in names)]
    cotangent = random(NUM_TOKENS, HIDDEN_SIZE, seed=11)
    with float32_as_float64():
        expected = value_and_grads(theirs, arrays, cotangent)
    assert_all_equal_to_rounding(value_and_grads(ours, arrays, cotangent), expected)


def test_grouped_sigmoid_topk_takes_groups_of_one_expert_and_negative_scores():
    logits = torch.tensor([[0.0, 2.0, -1.0, 1.0]])
    bias = torch.tensor([-1.0, -3.0, -1.0, -1.5])  # scores: -0.5, -2.1, -0.7, -0.8
    topk_weights, topk_ids = routers.grouped_sigmoid_topk(
        logits, bias, top_k=2, num_groups=4, topk_groups=3, renormalize=False, routed_scaling_factor=2.0
    )
    assert topk_ids.tolist() == [[0, 2]]
    torch.testing.assert_close(topk_weights, 2 * torch.sigmoid(logits[:, [0, 2]]), rtol=0, atol=0)


def test_an_expert_chosen_twice_counts_twice():
    (hidden_states, w13, w2, topk_weights), ids, _ = inputs_of_experts(torch.float64)
    twice = experts.fused_swiglu(hidden_states, w13, w2, topk_weights[:, :2], ids[:, :1].expand(-1, 2))
    once = experts.fused_swiglu(hidden_states, w13, w2, topk_weights[:, :2].sum(1, keepdim=True), ids[:, :1])
    assert_equal_to_rounding(twice, once)


@pytest.mark.parametrize(("num_tokens", "num_experts", "capacity"), [(1, 3, 1), (10, 4, 3), (12, 4, 3), (13, 4, 4), (0, 4, 0)])
def test_switch_top1_drops_whoever_comes_too_late(num_tokens, num_experts, capacity):
    assert capacity_routers.expert_capacity(num_tokens, num_experts, 1.0) == capacity
    logits = random(num_tokens, num_experts, seed=2)
    logits[: 2 * num_tokens // 3, 0] += 9
    _, ids, dropped = capacity_routers.switch_top1(logits, capacity_factor=1.0)
    room = [capacity] * num_experts
    for expert, is_dropped in zip(ids.tolist(), dropped.tolist(), strict=True):
        assert is_dropped == (room[expert] == 0)
        room[expert] -= not is_dropped


TWO_EXPERTS = {
    "router_logits": torch.tensor([[4.0, 2, 1], [4, 3, 1], [1, 6, 2], [6, 2, 1]]),  # first 0, 0, 1, 0, then 1, 1, 2, 1
    "noise": None,
    "attention_mask": torch.ones(4, dtype=torch.bool),
    "second_expert_policy": "all",
    "normalize_before_dropping": True,
    "capacity_factor": 1.5,  # room for two
}


def test_gshard_top2_asks_all_first_experts_before_any_second():
    weights, ids, dropped = capacity_routers.gshard_top2(**TWO_EXPERTS)
    assert ids.tolist() == [[0, 1], [0, 1], [1, 2], [0, 1]]
    assert dropped.tolist() == [[False, False], [False, True], [False, False], [True, True]]
    shares = torch.sigmoid(torch.tensor([2.0, 1, 4]))
    torch.testing.assert_close(weights[:3, 0], shares)
    torch.testing.assert_close(weights[:, 1], torch.tensor([1 - shares[0], 0, 1 - shares[2], 0]))


def test_gshard_top2_gives_what_is_kept_the_weight_of_what_is_dropped():
    weights, _, _ = capacity_routers.gshard_top2(**TWO_EXPERTS | {"normalize_before_dropping": False})
    torch.testing.assert_close(weights[[1, 3]], torch.tensor([[1.0, 0], [0, 0]]))
    torch.testing.assert_close(weights[0], torch.sigmoid(torch.tensor([2.0, -2])))


def test_expert_choice_by_hand():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    weights, ids = capacity_routers.expert_choice(probabilities.log(), capacity_factor=1.25)  # 4 * 1.25 / 3, rounded up
    assert ids.tolist() == [[1, 0], [2, 0], [3, 1]]  # token 0 and token 1 have two experts, the others one
    torch.testing.assert_close(weights, torch.tensor([[0.6, 0.5], [0.8, 0.3], [0.6, 0.3]]))
    everyone, _ = capacity_routers.expert_choice(probabilities.log(), capacity_factor=9.0)
    assert everyone.shape == (3, 4)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("renormalize", [True, False])
def test_jitted_jax_routers_are_those_of_torch(x64, renormalize):
    dtype = torch.float64 if x64 else torch.float32
    logits = random(NUM_TOKENS, NUM_EXPERTS, seed=0, dtype=dtype)
    bias = random(NUM_EXPERTS, seed=1, dtype=dtype)
    options = {"top_k": TOP_K, "renormalize": renormalize}
    grouped = {"num_groups": 4, "topk_groups": 2, "routed_scaling_factor": 2.5, **options}
    with jax.enable_x64(x64):
        for ours, twin, arrays, static in (
            (routers.softmax_topk, jax_routers.softmax_topk, (logits,), options),
            (routers.grouped_sigmoid_topk, jax_routers.grouped_sigmoid_topk, (logits, bias), grouped),
            (capacity_routers.switch_top1, jax_capacity_routers.switch_top1, (logits,), {"capacity_factor": 1.1}),
        ):
            weights, ids, *dropped = ours(*arrays, **static)
            jax_arrays = [jnp.asarray(array.numpy()) for array in arrays]
            jitted = jax.jit(twin, static_argnames=tuple(static))
            jax_weights, jax_ids, *jax_dropped = jitted(*jax_arrays, **static)
            assert jax_ids.dtype == jnp.int32 and ids.dtype == torch.int64
            np.testing.assert_array_equal(jax_ids, ids)
            np.testing.assert_array_equal(jax_dropped, dropped)
            assert_equal_to_rounding(jax_weights, weights)


def jax_ragged_swiglu(hidden_states, w13, w2, topk_weights, topk_ids):
    return optimized_jax_experts.ragged_experts(hidden_states, expert_calls.swiglu(w13, w2), topk_weights, topk_ids)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    "jax_function",
    [
        jax.jit(jax_experts.fused_swiglu),
        optimized_jax_experts.fused_swiglu,
        jax.jit(optimized_jax_experts.fused_swiglu),
        jax_ragged_swiglu,
    ],
    ids=["reference", "optimized", "optimized-under-jit", "optimized-for-accelerators"],
)
def test_jax_experts_are_those_of_torch(jax_function, x64):
    arrays, ids, cotangent = inputs_of_experts(torch.float64 if x64 else torch.float32)
    expected = value_and_grads(lambda *floats: experts.fused_swiglu(*floats, ids), arrays, cotangent)
    with jax.enable_x64(x64):
        jax_ids = jnp.asarray(ids.numpy())
        actual = jax_value_and_grads(lambda *floats: jax_function(*floats, jax_ids), arrays, cotangent)
        assert_all_equal_to_rounding(actual, expected)


def test_nan_in_one_expert_stays_with_its_tokens():
    arrays, ids, cotangent = inputs_of_experts(torch.float32)
    w13 = arrays[1]
    w13[5, 0, 0] = torch.nan
    jax_ids, jax_function = jnp.asarray(ids.numpy()), jax.jit(jax_experts.fused_swiglu)

    torch_results = value_and_grads(lambda *floats: experts.fused_swiglu(*floats, ids), arrays, cotangent)
    jax_results = jax_value_and_grads(lambda *floats: jax_function(*floats, jax_ids), arrays, cotangent)
    for out, grad_hidden_states, *_ in (torch_results, jax_results):
        for rows in (out, grad_hidden_states):
            np.testing.assert_array_equal(np.isnan(np.asarray(rows)).any(axis=1), (ids == 5).any(dim=1))


VALID = {
    "softmax_topk": {"router_logits": torch.zeros(8, 6), "top_k": 2, "renormalize": True},
    "grouped_sigmoid_topk": {
        "router_logits": torch.zeros(8, 6),
        "e_score_correction_bias": torch.zeros(6),
        "top_k": 2,
        "num_groups": 3,
        "topk_groups": 2,
        "renormalize": True,
        "routed_scaling_factor": 1.0,
    },
    "switch_top1": {"router_logits": torch.zeros(8, 6), "capacity_factor": 1.25},
    "gshard_top2": TWO_EXPERTS,
    "fused_swiglu": {
        "hidden_states": torch.zeros(8, 4),
        "w13": torch.zeros(6, 10, 4),
        "w2": torch.zeros(6, 4, 5),
        "topk_weights": torch.zeros(8, 2),
        "topk_ids": torch.zeros(8, 2, dtype=torch.int64),
    },
}


@pytest.mark.parametrize(
    ("function", "argument", "bad", "error", "message"),
    [
        ("softmax_topk", "router_logits", [[0.0]], TypeError, "an array, got list"),
        ("softmax_topk", "router_logits", torch.zeros(8, 6).int(), TypeError, "got int32"),
        ("softmax_topk", "router_logits", torch.zeros(6), ValueError, "[num_tokens, num_experts], got (6,)"),
        ("softmax_topk", "top_k", 0, ValueError, "1..num_experts=6, got 0"),
        ("softmax_topk", "top_k", 7, ValueError, "1..num_experts=6, got 7"),
        ("softmax_topk", "top_k", 2.0, TypeError, "an integer, got 2.0"),
        ("grouped_sigmoid_topk", "e_score_correction_bias", torch.zeros(5), ValueError, "got (5,)"),
        ("grouped_sigmoid_topk", "e_score_correction_bias", torch.zeros(6).int(), TypeError, "got int32"),
        ("grouped_sigmoid_topk", "num_groups", 4, ValueError, "divide num_experts=6, got 4"),
        ("grouped_sigmoid_topk", "topk_groups", 4, ValueError, "1..num_groups=3, got 4"),
        ("grouped_sigmoid_topk", "top_k", 5, ValueError, "1..experts in the kept groups=4, got 5"),
        ("switch_top1", "router_logits", torch.zeros(6), ValueError, "[num_tokens, num_experts], got (6,)"),
        ("switch_top1", "router_logits", torch.zeros(8, 0), ValueError, "at least one expert, got (8, 0)"),
        ("switch_top1", "capacity_factor", 0.0, ValueError, "positive, got 0.0"),
        ("switch_top1", "capacity_factor", "1", TypeError, "a number, got '1'"),
        ("gshard_top2", "router_logits", torch.zeros(4, 1), ValueError, "at least two experts, got (4, 1)"),
        ("gshard_top2", "second_expert_policy", "none", ValueError, "'all' or 'sampling' or 'random', got 'none'"),
        ("gshard_top2", "noise", torch.zeros(4, 2), ValueError, "[num_tokens=4, num_experts=3], got (4, 2)"),
        ("gshard_top2", "attention_mask", torch.ones(4), TypeError, "bool, got float32"),
        ("fused_swiglu", "hidden_states", torch.zeros(8, 4).bool(), TypeError, "got bool"),
        ("fused_swiglu", "w13", torch.zeros(6, 10, 4).half(), TypeError, "float32, got float16"),
        ("fused_swiglu", "w13", torch.zeros(6, 10, 3), ValueError, "hidden_size=4], got (6, 10, 3)"),
        ("fused_swiglu", "w13", torch.zeros(0, 10, 4), ValueError, "at least one expert, got (0, 10, 4)"),
        ("fused_swiglu", "w13", torch.zeros(6, 9, 4), ValueError, "as many gate rows as up rows, got 9 rows"),
        ("fused_swiglu", "w2", torch.zeros(6, 4, 5).half(), TypeError, "float32, got float16"),
        ("fused_swiglu", "w2", torch.zeros(6, 5, 4), ValueError, "hidden_size=4, intermediate_size=5]"),
        ("fused_swiglu", "topk_weights", torch.zeros(8, 3), ValueError, "[num_tokens=8, top_k=2], got (8,"),
        ("fused_swiglu", "topk_weights", torch.zeros(8, 2).int(), TypeError, "got int32"),
        ("fused_swiglu", "topk_ids", torch.zeros(8, 2), TypeError, "got float32"),
        ("fused_swiglu", "topk_ids", torch.zeros(7, 2).int(), ValueError, "[num_tokens=8, top_k], got (7,"),
        ("fused_swiglu", "topk_ids", torch.full((8, 2), 6), ValueError, "in 0..5, got 6..6"),
        ("fused_swiglu", "topk_ids", torch.full((8, 2), -1), ValueError, "in 0..5, got -1..-1"),
    ],
)
def test_a_bad_call_names_its_argument(function, argument, bad, error, message):
    def jax_array(value):
        return jnp.asarray(value.numpy()) if isinstance(value, torch.Tensor) else value

    call = VALID[function] | {argument: bad}
    jax_call = {name: jax_array(value) for name, value in call.items()}
    families = ((experts, jax_experts), (routers, jax_routers), (capacity_routers, jax_capacity_routers))
    references = next(each for each in families if hasattr(each[0], function))
    for module, arguments in zip(references, (call, jax_call), strict=True):
        with pytest.raises(error, match=f"^{argument} must .*{re.escape(message)}"):
            getattr(module, function)(**arguments)


@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_what_is_drawn_needs_its_noise(policy):
    with pytest.raises(ValueError, match=f"^noise must be given for the policy '{policy}', got None"):
        capacity_routers.gshard_top2(**TWO_EXPERTS | {"second_expert_policy": policy})


def test_tensors_on_two_devices_are_rejected():
    call = VALID["fused_swiglu"] | {"w2": torch.zeros(6, 4, 5, device="meta")}
    with pytest.raises(ValueError, match=r"^w2 must be on the device of hidden_states \(cpu\), got meta"):
        experts.fused_swiglu(**call)


@pytest.mark.parametrize(
    ("framework", "absent"),
    [
        ("torch", "jax jaxlib numpy triton hypothesis transformers pytest"),
        ("jax", "torch triton hypothesis transformers pytest"),
    ],
)
def test_references_import_only_their_framework(framework, absent):
    script = f"""
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent.split()!r}:
            raise ModuleNotFoundError(name + " is not installed")

sys.meta_path.insert(0, Absent())
import gaugeblock.reference.{framework} as package
for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
"""
    subprocess.run([sys.executable, "-c", script], cwd=REFERENCE.parent, check=True, timeout=60)
