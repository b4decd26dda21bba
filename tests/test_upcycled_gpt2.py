"""The upcycled GPT-2 against transformers' own, with experts and without, against its twin, and by itself."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # transformers imports triton, which then decorates

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from test_references import random

from gaugeblock.conformance.peers import transformers_gpt2
from gaugeblock.reference import states, upcycled_checkpoints
from gaugeblock.reference.configs import UPCYCLED_GPT2_PRESETS, UpcycledGPT2Config
from gaugeblock.reference.jax import upcycled_gpt2 as jax_upcycled_gpt2
from gaugeblock.reference.torch import upcycled_gpt2

# sizes that differ pairwise, so that none can stand for another
SMALL = UpcycledGPT2Config(
    vocab_size=11, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=9,
    layer_norm_eps=1e-3, moe_layers=(0, 2), num_experts=5,
)  # fmt: skip
DENSE = replace(SMALL, moe_layers=())
CONFIGS = {"top-1": SMALL, "top-2": replace(SMALL, top_k=2, moe_layers=(1,))}
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
IDS = torch.tensor([[1, 10, 2, 7, 10, 7, 0], [7, 5, 5, 8, 8, 9, 3]])
EPS = np.finfo(np.float64).eps


def parameters(config: UpcycledGPT2Config) -> dict[str, torch.Tensor]:
    """Random float64 parameters, none of which is 0 or 1."""
    return {
        name: random(*shape, seed=seed) * (0.5 if len(shape) == 1 else torch.Size(shape[1:]).numel() ** -0.5)
        for seed, (name, shape) in enumerate(upcycled_gpt2.state_shapes(config).items())
    }


def noise(config: UpcycledGPT2Config, std: float = 0.5) -> torch.Tensor:
    return std * random(*IDS.shape, len(config.moe_layers), config.num_experts, seed=90)


def dense_of_transformers() -> torch.nn.Module:
    sizes = {"vocab_size": 11, "n_embd": 12, "n_inner": 20, "n_layer": 3, "n_head": 4, "n_positions": 9}
    theirs = transformers.GPT2Config(**sizes, layer_norm_epsilon=1e-3, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(theirs).double().eval()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = random(*parameter.shape, seed=seed) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    return model


@EACH_CONFIG
@pytest.mark.parametrize("training", [True, False])
def test_it_is_transformers_gpt2_with_experts_in_its_blocks(config, training):
    """Outputs and the gradients of all parameters, in float64."""
    results = []
    for function in (upcycled_gpt2.upcycled_gpt2, transformers_gpt2.TransformersUpcycledGpt2()):
        leaves = {name: each.requires_grad_() for name, each in parameters(config).items()}
        outputs = function(leaves, IDS, noise(config), training=training, config=config)
        scalar = sum((random(*each.shape, seed=70 + place) * each).sum() for place, each in enumerate(outputs[:4]))
        gradients = torch.autograd.grad(scalar, leaves.values())
        results.append((outputs, gradients))
    (outputs, gradients), (their_outputs, their_gradients) = results
    for one, other in zip((*outputs, *gradients), (*their_outputs, *their_gradients), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    gate = f"transformer.h.{config.moe_layers[0]}.mlp.router.gate.weight"
    assert (gradients[list(leaves).index(gate)] != 0).all()


def test_without_experts_it_is_gpt2():
    model = dense_of_transformers()
    state = upcycled_gpt2.load_state(model.state_dict(), config=DENSE)
    logits, *said = upcycled_gpt2.upcycled_gpt2(state, IDS, noise(DENSE), training=True, config=DENSE)
    torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-12, atol=1e-13)
    assert [each.shape for each in said] == [(2, 7, 0, 5), (2, 7, 0, 5), (2, 7, 0), (2, 0, 5)]


@pytest.mark.parametrize("changes", [{}, {"top_k": 2}, {"num_experts": 1}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_exact_copies_are_the_dense_model_whatever_the_router_chooses(changes, training):
    dense, config = parameters(DENSE), replace(SMALL, **changes)
    state = upcycled_gpt2.upcycled_state(dense, config=config, seed=3, perturbation_std=0.0)
    expected = upcycled_gpt2.upcycled_gpt2(dense, IDS, noise(DENSE), training=True, config=DENSE)[0]
    logits, *_, load = upcycled_gpt2.upcycled_gpt2(state, IDS, noise(config), training=training, config=config)
    # of two experts the weights sum to 1 less 1e-9
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-7 if config.top_k > 1 else 1e-12)
    torch.testing.assert_close(load.sum(-1), torch.ones_like(load[..., 0]), rtol=4 * EPS, atol=0)


def test_the_start_is_the_dense_model_but_for_the_experts_perturbation():
    """Its mean relative error is 0.002 to 0.003 in the public runs; the public check allows 0.02."""
    dense = parameters(DENSE)
    state = upcycled_gpt2.upcycled_state(dense, config=SMALL, seed=3)
    expected = upcycled_gpt2.upcycled_gpt2(dense, IDS, noise(DENSE), training=True, config=DENSE)[0]
    logits = upcycled_gpt2.upcycled_gpt2(state, IDS, noise(SMALL), training=True, config=SMALL)[0]
    assert 0 < (logits - expected).abs().mean() / expected.abs().mean() < 0.01
    for index in (0, 2):
        copies, one = state[f"transformer.h.{index}.mlp.experts.c_fc.weight"], dense[f"transformer.h.{index}.mlp.c_fc.weight"]
        assert len({each.numpy().tobytes() for each in copies}) == 5
        deviations = (copies - one).std(dim=(1, 2)) / one.std()
        assert ((deviations > 0.8e-3) & (deviations < 1.2e-3)).all()
    gates = [state[f"transformer.h.{index}.mlp.router.gate.weight"] for index in (0, 2)]
    assert not gates[0].equal(gates[1]) and all(each.abs().max() <= 12**-0.5 for each in gates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_rounds_once(dtype):
    state = {name: each.to(dtype) for name, each in parameters(SMALL).items()}
    wide = {name: each.float() for name, each in state.items()}
    results = [upcycled_gpt2.upcycled_gpt2(each, IDS, noise(SMALL), training=True, config=SMALL) for each in (state, wide)]
    assert results[0][0].equal(results[1][0].to(dtype)) and results[0][0].dtype == dtype
    assert all(one.equal(other) and one.dtype == torch.float32 for one, other in zip(results[0][1:], results[1][1:], strict=True))


def test_a_token_sees_none_that_follow_it():
    state, other = parameters(SMALL), IDS.clone()
    other[:, 4] = (other[:, 4] + 1) % 11
    results = [upcycled_gpt2.upcycled_gpt2(state, ids, noise(SMALL), training=True, config=SMALL) for ids in (IDS, other)]
    for one, two in zip(*(result[:4] for result in results), strict=True):
        # products of all tokens: their bits depend on which tokens an expert has
        torch.testing.assert_close(one[:, :4], two[:, :4], rtol=1e-12, atol=1e-14)
        assert (one[:, 4:] != two[:, 4:]).any()


def test_in_evaluation_there_is_no_noise_and_no_gradient_of_one_experts_weight():
    leaves = {name: each.requires_grad_() for name, each in parameters(SMALL).items()}
    outputs = upcycled_gpt2.upcycled_gpt2(leaves, IDS, noise(SMALL), training=False, config=SMALL)
    silent = upcycled_gpt2.upcycled_gpt2(leaves, IDS, 0 * noise(SMALL), training=True, config=SMALL)
    for one, other in zip(outputs, silent, strict=True):
        assert one.equal(other)
    gate = leaves["transformer.h.2.mlp.router.gate.weight"]
    assert torch.autograd.grad(outputs[0].square().sum(), gate, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(silent[0].square().sum(), gate)[0].abs().min() > 0


def test_noise_gets_no_gradient():
    drawn = noise(SMALL).requires_grad_()
    leaves = {name: each.requires_grad_() for name, each in parameters(SMALL).items()}
    outputs = upcycled_gpt2.upcycled_gpt2(leaves, IDS, drawn, training=True, config=SMALL)
    assert torch.autograd.grad(outputs[2].square().sum(), drawn, allow_unused=True) == (None,)
    with jax.enable_x64(True):
        state = {name: jnp.asarray(each.detach().numpy()) for name, each in leaves.items()}

        def of_noise(drawn: jax.Array) -> jax.Array:
            ids = jnp.asarray(IDS.numpy())
            return jnp.square(jax_upcycled_gpt2.upcycled_gpt2(state, ids, drawn, training=True, config=SMALL)[2]).sum()

        assert (jax.grad(of_noise)(jnp.asarray(drawn.detach().numpy())) == 0).all()


@EACH_CONFIG
def test_torch_and_jax_are_the_same(config):
    with jax.enable_x64(True):
        state = parameters(config)
        jax_state = {name: jnp.asarray(each.numpy()) for name, each in state.items()}
        options = {"training": True, "config": config}
        ours = upcycled_gpt2.upcycled_gpt2(state, IDS, noise(config), **options)
        arrays = jnp.asarray(IDS.numpy()), jnp.asarray(noise(config).numpy())
        theirs = jax_upcycled_gpt2.upcycled_gpt2(jax_state, *arrays, **options)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-11, atol=1e-13)
    assert upcycled_gpt2.state_shapes(config) == jax_upcycled_gpt2.state_shapes(config)


def test_torch_and_jax_start_from_the_same_bits():
    dense = {name: each.float() for name, each in parameters(DENSE).items()}
    state = upcycled_gpt2.upcycled_state(dense, config=SMALL, seed=2**40)
    jax_dense = {name: jnp.asarray(each.numpy()) for name, each in dense.items()}
    jax_state = jax_upcycled_gpt2.upcycled_state(jax_dense, config=SMALL, seed=2**40)
    assert list(jax_state) == list(state)
    for name, each in state.items():
        np.testing.assert_allclose(jax_state[name], each, rtol=2e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    ("module", "array"), [(upcycled_gpt2, torch.as_tensor), (jax_upcycled_gpt2, jnp.asarray)], ids=["torch", "jax"]
)
def test_no_sequences_are_an_ordinary_call(module, array):
    state = {name: array(each.float().numpy()) for name, each in parameters(SMALL).items()}
    none = array(IDS[:0].numpy()), array(noise(SMALL)[:0].float().numpy())
    outputs = module.upcycled_gpt2(state, *none, training=True, config=SMALL)
    assert [tuple(each.shape) for each in outputs] == [(0, 7, 11), (0, 7, 2, 5), (0, 7, 2, 5), (0, 7, 2), (0, 2, 5)]


def public(state: dict[str, torch.Tensor], config: UpcycledGPT2Config) -> dict[str, torch.Tensor]:
    """As moe-emergence saves a model."""
    named = {**state, "lm_head.weight": state[upcycled_gpt2.TOKENS].clone(), "transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9)}
    counters = {"router.training_step": torch.tensor(7), "router.anneal_steps": torch.tensor(25)}
    for index in config.moe_layers:
        prefix = f"transformer.h.{index}.mlp"
        own = states.part(state, prefix)
        layer = upcycled_checkpoints.to_public(upcycled_checkpoints.UpcycledLayer(own, counters), prefix=f"{prefix}.")
        named = {name: each for name, each in named.items() if not name.startswith(f"{prefix}.")} | layer
    return named


@pytest.mark.parametrize("module", [upcycled_gpt2, jax_upcycled_gpt2], ids=["torch", "jax"])
def test_a_public_checkpoint_is_read(module):
    state = {name: each.float() for name, each in parameters(SMALL).items()}
    theirs = public(state, SMALL)
    bare = {name.removeprefix("transformer."): each for name, each in theirs.items() if name != "lm_head.weight"}
    for each in (theirs, bare):
        arrays = each if module is upcycled_gpt2 else {name: jnp.asarray(tensor.numpy()) for name, tensor in each.items()}
        loaded = module.load_state(arrays, config=SMALL)
        assert list(loaded) == list(state)
        assert all(np.array_equal(loaded[name], state[name]) for name in state)

    with pytest.raises(ValueError, match=r"lm_head\.weight equal to transformer\.wte\.weight"):
        module.load_state({**arrays, "lm_head.weight": arrays["wte.weight"] + 1}, config=SMALL)
    with pytest.raises(ValueError, match=r"router\.gate\.weight"):
        module.load_state(arrays, config=replace(SMALL, moe_layers=(0, 1, 2)))


def test_a_checkpoint_of_transformers_has_the_parameters_names():
    shapes = {name: tuple(each.shape) for name, each in dense_of_transformers().state_dict().items() if name != "lm_head.weight"}
    assert shapes == upcycled_gpt2.state_shapes(DENSE)


def test_published_sizes():
    counts = {name: states.num_parameters(upcycled_gpt2.state_shapes(config)) for name, config in UPCYCLED_GPT2_PRESETS.items()}
    of_an_mlp = 2 * 768 * 3072 + 768 + 3072
    assert counts["dense"] == 124_439_808  # openai-community/gpt2
    assert counts["moe-main"] == counts["top2"] == counts["dense"] + 4 * (7 * of_an_mlp + 8 * 768)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"num_experts": 0}, "num_experts must be positive"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of 5"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be positive"),
        ({"moe_layers": (2, 0)}, "moe_layers must be a tuple of places in 0..2 that ascend"),
        ({"moe_layers": (1, 3)}, "moe_layers must be"),
        ({"moe_layers": (1, 1)}, "moe_layers must be"),
        ({"top_k": 6}, "top_k must be in 1..num_experts=5"),
    ],
)
def test_a_bad_config_is_rejected_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)
