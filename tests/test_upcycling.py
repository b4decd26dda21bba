"""Upcycled layers: the dense MLP they begin as, the public names, draws, and the optimizer's step of experts that had tokens."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_references import assert_all_equal_to_rounding, assert_equal_to_rounding, random
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from gaugeblock.reference import purposes
from gaugeblock.reference.jax import upcycling as jax_upcycling
from gaugeblock.reference.torch import random as torch_random
from gaugeblock.reference.torch import upcycling
from gaugeblock.reference.torch.biased_moe_layers import upcycled_gpt2_moe
from gaugeblock.reference.upcycled_checkpoints import GATE, OF_AN_EXPERT, from_public, to_public

NUM_TOKENS, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS = 70, 24, 96, 8
PREFIX = "transformer.h.8.mlp."


def mlp() -> GPT2MLP:
    """GPT-2's, with random weights and biases, in float64 and without dropout."""
    module = GPT2MLP(INTERMEDIATE_SIZE, GPT2Config(n_embd=HIDDEN_SIZE)).double().eval()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = random(*parameter.shape, seed=seed) / HIDDEN_SIZE**0.5
    return module


def dense(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {name: each.to(dtype) for name, each in mlp().state_dict().items()}


def draws(seed: int = 1, num_experts: int = NUM_EXPERTS) -> dict[str, torch.Tensor]:
    sizes = {"hidden_size": HIDDEN_SIZE, "intermediate_size": INTERMEDIATE_SIZE}
    return upcycling.upcycling_draws(num_experts=num_experts, **sizes, seed=seed)


def layer(hidden_states, state, top_k, training=True):
    """What a layer returns first, without noise."""
    noise = torch.zeros(len(hidden_states), len(state[GATE]))
    return upcycled_gpt2_moe(hidden_states, state, noise, top_k=top_k, noise_std=0.0, training=training)[0]


def beside_dense(hidden_states, parameters, top_k):
    """The layer's tokens, and those of one expert alone, which is the dense MLP: all rows are multiplied at once."""
    copies = upcycling.upcycle(parameters, draws(), perturbation_std=0.0)
    one = upcycling.upcycle(parameters, draws(num_experts=1), perturbation_std=0.0)
    return layer(hidden_states, copies, top_k), layer(hidden_states, one, top_k=1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_an_upcycled_layer_is_the_mlp_of_gpt2(top_k, training):
    tokens = random(NUM_TOKENS, HIDDEN_SIZE, seed=5)
    state = upcycling.upcycle(dense(), draws(), perturbation_std=0.0)
    expected = mlp()(tokens).detach()
    actual = layer(tokens, state, top_k, training)
    if top_k == 1:
        assert_equal_to_rounding(actual, expected)
    else:  # the weights sum to 1 / (1 + 1e-9 / p), p being the probability of the chosen, 1/8 and more
        assert (actual - expected).abs().max() < 8e-9 * expected.abs().max() and not torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_per_token_gives_the_bits_of_the_dense_mlp(dtype):
    """In float64, whose last bits products of other numbers of rows change, rounded to the dtype."""
    tokens, parameters = random(NUM_TOKENS, HIDDEN_SIZE, seed=5).to(dtype).double(), dense(dtype)
    actual, expected = beside_dense(tokens, {name: each.double() for name, each in parameters.items()}, top_k=1)
    assert torch.equal(actual.to(dtype), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_per_token_gives_the_bits_of_the_dense_mlp_where_products_are_exact(dtype):
    """Sums of one number, or of integers, are the same bits whatever kernel a library takes for so many rows."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name: torch.zeros_like(each) for name, each in dense(dtype).items()}
    parameters["c_fc.weight"] = torch.randint(-2, 3, (HIDDEN_SIZE, INTERMEDIATE_SIZE), generator=generator).to(dtype) / 16
    parameters["c_proj.weight"][torch.randperm(INTERMEDIATE_SIZE, generator=generator)[:HIDDEN_SIZE]] = torch.eye(
        HIDDEN_SIZE, dtype=dtype
    )
    parameters["c_proj.bias"] = dense(dtype)["c_proj.bias"]
    tokens = torch.randint(-8, 9, (NUM_TOKENS, HIDDEN_SIZE), generator=generator).to(dtype) / 8
    actual, expected = beside_dense(tokens, parameters, top_k=1)
    assert expected.unique().numel() > NUM_TOKENS and torch.equal(actual, expected)


@pytest.mark.parametrize("top_k", [1, 2])
def test_in_float32_an_upcycled_layer_is_the_dense_mlp_to_rounding(top_k):
    tokens, parameters = random(NUM_TOKENS, HIDDEN_SIZE, seed=5).float(), dense(torch.float32)
    assert_equal_to_rounding(*beside_dense(tokens, parameters, top_k))


def test_gradients_of_copies_add_up_to_those_of_the_dense_mlp():
    tokens, cotangent, module = random(NUM_TOKENS, HIDDEN_SIZE, seed=5), random(NUM_TOKENS, HIDDEN_SIZE, seed=6), mlp()
    state = upcycling.upcycle(dense(), draws(), perturbation_std=0.0)
    leaves = {name: each.requires_grad_() for name, each in state.items() if name != GATE}
    grads = torch.autograd.grad(layer(tokens, {**state, **leaves}, top_k=1), [*leaves.values()], cotangent)
    expected = torch.autograd.grad(module(tokens), [*module.parameters()], cotangent)
    assert_all_equal_to_rounding([each.sum(0) for each in grads], expected)


def test_copies_are_exact_and_share_no_memory():
    parameters = dense(torch.bfloat16)
    parameters["c_fc.bias"][0] = -0.0
    state = upcycling.upcycle(parameters, draws(), perturbation_std=0.0)
    for name in OF_AN_EXPERT:
        for expert in state[f"experts.{name}"]:
            assert torch.equal(expert.view(torch.int16), parameters[name].view(torch.int16))
    state["experts.c_fc.weight"][0] += 1
    assert torch.equal(state["experts.c_fc.weight"][1], parameters["c_fc.weight"])


def test_noise_has_a_thousandth_of_each_parameters_deviation():
    parameters = dense()
    state = upcycling.upcycle(parameters, draws(), perturbation_std=1e-3)
    for name in OF_AN_EXPERT:
        copies, deviation = state[f"experts.{name}"], parameters[name].std()
        assert_equal_to_rounding(copies, parameters[name] + 1e-3 * deviation * draws()[f"experts.{name}"].double())
        assert all(not torch.equal(copies[0], each) for each in copies[1:])
    assert torch.equal(state[GATE], draws()[GATE].double())


def test_a_parameter_of_one_element_gets_no_noise_and_not_a_nan():
    one = {name: torch.ones([1] * each.ndim) for name, each in dense().items()}
    sizes = {"num_experts": 2, "hidden_size": 1, "intermediate_size": 1}
    state = upcycling.upcycle(one, upcycling.upcycling_draws(**sizes, seed=0), perturbation_std=1e-3)
    assert all(torch.equal(each, torch.ones_like(each)) for name, each in state.items() if name != GATE)


def test_draws_are_keyed_in_the_public_order():
    drawn, example = draws(seed=7), 1
    for expert in range(NUM_EXPERTS):
        for name in OF_AN_EXPERT:
            key = {"seed": 7, "step": 0, "example": example, "purpose": purposes.UPCYCLING}
            shape = drawn[f"experts.{name}"].shape[1:]
            assert torch.equal(drawn[f"experts.{name}"][expert], torch_random.normal(shape, **key))
            example += 1
    bound = HIDDEN_SIZE**-0.5
    assert drawn[GATE].abs().max() <= bound and drawn[GATE].min() < -0.9 * bound and drawn[GATE].max() > 0.9 * bound


@pytest.mark.parametrize("perturbation_std", [0.0, 1e-3])
def test_jax_draws_and_copies_alike(perturbation_std):
    sizes = {"hidden_size": HIDDEN_SIZE, "intermediate_size": INTERMEDIATE_SIZE}
    drawn = jax_upcycling.upcycling_draws(num_experts=NUM_EXPERTS, **sizes, seed=1)
    for name, expected in draws().items():
        np.testing.assert_array_equal(drawn[name], expected)
    parameters = dense(torch.float32)
    expected = upcycling.upcycle(parameters, draws(), perturbation_std=perturbation_std)
    given = {name: jnp.asarray(each.numpy()) for name, each in parameters.items()}
    actual = jax_upcycling.upcycle(given, drawn, perturbation_std=perturbation_std)
    assert [*actual] == [*expected]
    for name, each in expected.items():
        assert_equal_to_rounding(torch.from_numpy(np.array(actual[name])), each)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"perturbation_std": -1.0}, ValueError, "perturbation_std must be 0 or more, got -1.0"),
        ({"dense": {}}, ValueError, "dense must have c_fc.weight, "),
        ({"draws": []}, TypeError, "draws must be a dict of arrays, got list"),
        (
            {"dense": {**dense(), "c_fc.bias": torch.zeros(3)}},
            ValueError,
            "dense['c_fc.bias'] must be [intermediate_size=96], got",
        ),
        ({"dense": {**dense(), "c_proj.bias": torch.zeros(24).int()}}, TypeError, "dense['c_proj.bias'] must be bfloat16"),
    ],
)
def test_a_bad_call_names_its_argument(changes, error, message):
    call = {"dense": dense(), "draws": draws(), "perturbation_std": 1e-3} | changes
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        upcycling.upcycle(call["dense"], call["draws"], perturbation_std=call["perturbation_std"])


def public_layer() -> dict[str, torch.Tensor]:
    state = {f"router.{name}": torch.tensor(count) for name, count in (("training_step", 7), ("anneal_steps", 2500))}
    state[GATE] = random(3, HIDDEN_SIZE, seed=0)
    for expert in range(3):
        state |= {f"experts.{expert}.{name}": random(*each.shape, seed=expert) for name, each in mlp().state_dict().items()}
    return {PREFIX + name: each for name, each in state.items()}


def test_public_names_come_back_bit_for_bit():
    public = public_layer()
    read = from_public({**public, "transformer.wte.weight": torch.zeros(2)}, prefix=PREFIX, num_experts=3)
    assert {name: tuple(each.shape) for name, each in read.state.items()} == {
        "router.gate.weight": (3, 24),
        "experts.c_fc.weight": (3, 24, 96),
        "experts.c_fc.bias": (3, 96),
        "experts.c_proj.weight": (3, 96, 24),
        "experts.c_proj.bias": (3, 24),
    }
    assert {name: int(each) for name, each in read.counters.items()} == {"router.training_step": 7, "router.anneal_steps": 2500}
    written = to_public(read, prefix=PREFIX)
    assert [*written] == [*public] and all(torch.equal(written[name], each) for name, each in public.items())


def test_public_experts_one_after_the_other_are_the_layer():
    tokens, public = random(NUM_TOKENS, HIDDEN_SIZE, seed=8), public_layer()
    state = from_public(public, prefix=PREFIX).state
    noise = random(NUM_TOKENS, 3, seed=9)
    out, _, _, probs, _, load = upcycled_gpt2_moe(tokens, state, noise, top_k=2, noise_std=0.5, training=True)
    expected, counts = torch.zeros_like(tokens), [0, 0, 0]
    for token in range(NUM_TOKENS):
        chosen = probs[token].argsort(descending=True)[:2]
        for expert in chosen.tolist():
            own = {name: public[f"{PREFIX}experts.{expert}.{name}"] for name in OF_AN_EXPERT}
            one = torch.func.functional_call(mlp(), own, tokens[token, None])[0]
            expected[token] += probs[token, expert] / (probs[token, chosen].sum() + 1e-9) * one
            counts[expert] += 1
    assert_equal_to_rounding(out, expected)
    assert load.tolist() == [count / (2 * NUM_TOKENS) for count in counts]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("experts.1.c_fc.bias"), "experts.1.c_fc.bias is missing: an upcycled layer with num_experts=3"),
        (lambda state: state.update({"experts.0.c_gate.bias": torch.zeros(1)}), "experts.0.c_gate.bias is superfluous"),
        (lambda state: state.pop("router.anneal_steps"), "router.anneal_steps is missing"),
        (
            lambda state: state.update({"experts.2.c_fc.weight": torch.zeros(96, 24)}),
            "experts.2.c_fc.weight must be [hidden_size=24",
        ),
    ],
)
def test_a_wrong_public_layer_is_told_by_the_entry(change, message):
    state = {name.removeprefix(PREFIX): each for name, each in public_layer().items()}
    change(state)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        from_public(state, num_experts=3)


RATES = {"learning_rate": 0.03, "beta1": 0.9, "beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.1}
USED = torch.tensor([[3, 0, 1, 0], [0, 0, 5, 0], [2, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 7]])  # of five steps and four experts


def experts_of_their_own(parameter: torch.Tensor, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """What torch.optim.AdamW makes of a parameter for each expert, whose gradient is None where it had no tokens."""
    experts = [torch.nn.Parameter(each.clone()) for each in parameter]
    optimizer = torch.optim.AdamW(experts, lr=RATES["learning_rate"], betas=(0.9, 0.999), weight_decay=RATES["weight_decay"])
    for tokens, gradient in zip(USED, gradients, strict=True):
        for expert, count in enumerate(tokens.tolist()):
            experts[expert].grad = gradient[expert] if count else None
        optimizer.step()
    states = [optimizer.state[each] for each in experts]
    zero, stepped = torch.zeros_like(parameter[0]), torch.stack([each.detach() for each in experts])
    moments = [torch.stack([each.get(name, zero) for each in states]) for name in ("exp_avg", "exp_avg_sq")]
    return [stepped, *moments, torch.tensor([int(each.get("step", 0)) for each in states])]


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_experts_without_tokens_are_skipped_as_parameters_without_gradient(framework):
    parameter = random(4, 5, 6, seed=0).float()
    gradients = [random(4, 5, 6, seed=1 + step).float() for step in range(len(USED))]
    expected = experts_of_their_own(parameter, gradients)
    on, module = (jnp.asarray, jax_upcycling) if framework == "jax" else (torch.from_numpy, upcycling)
    state = [on(each.numpy()) for each in (parameter, 0 * parameter, 0 * parameter, torch.zeros(4, dtype=torch.int32))]
    for tokens, gradient in zip(USED, gradients, strict=True):
        at_rest = [np.asarray(each)[tokens.numpy() == 0] for each in state]
        first, *others = state
        state = [*module.adamw_of_used_experts(first, on(gradient.numpy()), *others, on(tokens.int().numpy()), **RATES)]
        for before, after in zip(at_rest, state, strict=True):
            np.testing.assert_array_equal(np.asarray(after)[tokens.numpy() == 0], before)
    *actual, steps = (torch.from_numpy(np.asarray(each).copy()) for each in state)
    assert_all_equal_to_rounding(actual, expected[:3])
    assert steps.tolist() == expected[3].tolist() == [3, 0, 3, 2]


def test_no_gradient_passes_an_optimizers_step():
    arrays = [random(2, 3, seed=seed).square().requires_grad_() for seed in range(4)]
    counts = torch.tensor([1, 0]), torch.tensor([2, 2])
    assert not any(each.requires_grad for each in upcycling.adamw_of_used_experts(*arrays, *counts, **RATES))

    def total(*given):
        return jax_upcycling.adamw_of_used_experts(*given, *(jnp.asarray(each.numpy()) for each in counts), **RATES)[0].sum()

    given = [jnp.asarray(each.detach().float().numpy()) for each in arrays]
    assert not any(each.any() for each in jax.grad(total, argnums=(0, 1, 2, 3))(*given))
