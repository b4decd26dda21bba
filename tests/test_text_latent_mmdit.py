"""The text-latent MMDiT against PyPI's mmdit, against its twin, and by itself."""

import functools
import os
import re
from dataclasses import replace

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from agreement import assert_agree
from test_references import random
from wide_floats import float32_is_float64

from gaugeblock.optimized.triton.hyper_connections import hyper_connection
from gaugeblock.reference import states
from gaugeblock.reference.configs import TEXT_LATENT_MMDIT_PRESETS, TextLatentMMDiTConfig
from gaugeblock.reference.jax import text_latent_mmdit as jax_model
from gaugeblock.reference.torch import text_latent_mmdit as model

# sizes that differ pairwise, so that none can stand for another
SMALL = TextLatentMMDiTConfig(vocab_size=40, latent_dim=5, hidden_size=24, n_blocks=2, cond_dim=14, max_seq_len=9)
CLUSTERED = TextLatentMMDiTConfig(
    vocab_size=19, latent_dim=11, hidden_size=7, n_blocks=1, cond_dim=10, max_seq_len=8, cluster_size=3, num_residual_streams=3
)
CONFIGS = {"small": SMALL, "clustered": CLUSTERED}
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
EACH_TWIN = pytest.mark.parametrize("module", [model, jax_model], ids=["torch", "jax"])
NUM_TOKENS = 8
MASKS = {
    "none": None,
    # padding at the end, in the middle, and everywhere
    "padding": torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 1, 1, 1], [0] * 8]).bool(),
}
EACH_MASK = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
RESULTS = "text_logits", "latent_pred", "cluster_logits"
INPUTS = "latents", "text_timesteps", "latent_timesteps"


def random_state(config: TextLatentMMDiTConfig, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Matrices scaled by fan-in, none of them 0; scales of connections so large that these differ from token to token."""
    state = {}
    for seed, (name, shape) in enumerate(model.state_shapes(config).items()):
        fan_in = shape[-1] if name.endswith(".weight") and len(shape) == 2 else 4
        state[name] = random(*shape, seed=seed, dtype=dtype) * fan_in**-0.5
    return state


def random_inputs(config: TextLatentMMDiTConfig, *, batch_size=3, num_tokens=NUM_TOKENS, dtype=torch.float64):
    ids = torch.arange(batch_size * num_tokens).mul(7).remainder(config.vocab_size).reshape(batch_size, num_tokens)
    latents = random(batch_size, config.latent_dim, seed=90, dtype=dtype)
    times = torch.promote_types(dtype, torch.float32)
    return ids, latents, torch.linspace(1, 0.25, batch_size, dtype=times), torch.linspace(0, 0.98, batch_size, dtype=times)


def cotangents(config: TextLatentMMDiTConfig) -> tuple[torch.Tensor, ...]:
    shapes = (3, NUM_TOKENS, config.vocab_size), (3, 1, config.latent_dim), (3, NUM_TOKENS, config.cluster_logits_size)
    return tuple(random(*shape, seed=95 + place) for place, shape in enumerate(shapes))


def to_jax(tensors):
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), tensors)


def results(function, config, state, mask) -> dict[str, torch.Tensor]:
    """Return the results and the gradients of all parameters and inputs, by name."""
    ids, *floats = random_inputs(config)
    leaves = {name: entry.detach().requires_grad_() for name, entry in state.items()}
    inputs = {name: each.requires_grad_() for name, each in zip(INPUTS, floats, strict=True)}
    out = function(leaves, ids, *floats, mask, config=config)
    wanted = {**leaves, **inputs}
    gradients = torch.autograd.grad(out, [*wanted.values()], cotangents(config))
    return dict(zip([*RESULTS, *wanted], [*(each.detach() for each in out), *gradients], strict=True))


@EACH_MASK
@EACH_CONFIG
def test_text_latent_mmdit_is_that_of_mmdit(config, mask):
    pytest.importorskip("mmdit")
    from gaugeblock.conformance.peers.lucidrains import Mmdit

    state = random_state(config)
    with float32_is_float64():
        expected = results(Mmdit(), config, state, mask)
    # how the first connection mixes streams that are alike, and the last one those that are summed up, changes next to nothing
    assert all(each.abs().max() > 1e-4 for name, each in expected.items() if each.numel() and "residual_fns" not in name)
    assert_agree(results(model.text_latent_mmdit, config, state, mask), expected)


@EACH_CONFIG
def test_one_text_of_one_token_and_a_full_one(config):
    pytest.importorskip("mmdit")
    from gaugeblock.conformance.peers.lucidrains import Mmdit

    state = random_state(config)
    for num_tokens in (1, config.max_seq_len):
        inputs = random_inputs(config, batch_size=1, num_tokens=num_tokens)
        with float32_is_float64():
            theirs = dict(zip(RESULTS, Mmdit()(state, *inputs, config=config), strict=True))
        ours = dict(zip(RESULTS, model.text_latent_mmdit(state, *inputs, config=config), strict=True))
        assert_agree(ours, theirs)
        assert [tuple(each.shape) for each in ours.values()] == [
            (1, num_tokens, config.vocab_size), (1, 1, config.latent_dim), (1, num_tokens, config.cluster_logits_size)
        ]  # fmt: skip


# by LGDLM's classes; "cluster" was counted with a table of 30,522 tokens, which they round up to 30,592
COUNTED = {"smoke": 11_372_920, "cluster": 892_624_762 + 70 * (2 * 1024 + 1)}


@pytest.mark.parametrize("name", TEXT_LATENT_MMDIT_PRESETS)
def test_presets_are_the_published_models(name):
    config = TEXT_LATENT_MMDIT_PRESETS[name]
    shapes = model.state_shapes(config)
    assert states.num_parameters(shapes) == COUNTED[name]
    if name == "cluster":
        assert states.num_parameters(states.part(shapes, "mmdit")) == 806_341_664


@EACH_CONFIG
def test_names_and_shapes_are_those_of_mmdit(config):
    pytest.importorskip("mmdit")
    from gaugeblock.conformance.peers import lucidrains

    theirs = {name: tuple(each.shape) for name, each in lucidrains.model(config).named_parameters()}
    assert model.state_shapes(config) == theirs


@pytest.mark.parametrize(("config", "mask"), [(SMALL, MASKS["padding"]), (CLUSTERED, None)], ids=["padding", "clusters"])
def test_twins_agree(config, mask):
    state = random_state(config)
    with jax.enable_x64(True):
        ids, *floats = to_jax(random_inputs(config))
        jax_mask = None if mask is None else to_jax(mask)
        function = jax.jit(lambda state, *floats: jax_model.text_latent_mmdit(state, ids, *floats, jax_mask, config=config))
        out, pull_back = jax.vjp(function, to_jax(state), *floats)
        of_state, *of_inputs = pull_back(tuple(to_jax(cotangents(config))))
    actual = dict(zip(RESULTS, out, strict=True)) | of_state | dict(zip(INPUTS, of_inputs, strict=True))
    assert_agree(actual, results(model.text_latent_mmdit, config, state, mask))


@EACH_TWIN
def test_padding_is_seen_by_no_token_and_the_latent_by_all(module):
    state, (ids, *floats), mask = random_state(SMALL, torch.float32), random_inputs(SMALL, dtype=torch.float32), MASKS["padding"]
    changed = torch.where(mask, ids, (ids + 1) % SMALL.vocab_size)
    moved = floats[0] + 1
    if module is jax_model:
        state, ids, floats, mask, changed, moved = to_jax([state, ids, floats, mask, changed, moved])
    call = functools.partial(module.text_latent_mmdit, state, attention_mask=mask, config=SMALL)
    before, after = call(ids, *floats), call(changed, *floats)
    shown = np.asarray(mask)
    for each, other in zip(before[:2], after[:2], strict=True):
        one, two = (np.asarray(array)[shown] if array.shape[1] > 1 else np.asarray(array) for array in (each, other))
        np.testing.assert_array_equal(one, two)
    other_latent = np.asarray(call(ids, moved, *floats[1:])[0])
    assert (np.asarray(before[0]) != other_latent).any(axis=-1).all()


@EACH_TWIN
def test_shares_of_streams_are_doubly_stochastic(module):
    scores = random(5, 4, 4, seed=1, dtype=torch.float32)
    shares = module.doubly_stochastic(to_jax(scores) if module is jax_model else scores)
    np.testing.assert_allclose(np.asarray(shares).sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(np.asarray(shares).sum(axis=-2), 1, atol=1e-3)


@EACH_TWIN
def test_streams_that_are_zero_have_finite_gradients(module):
    vectors = torch.zeros(2, 6)
    vectors[1] = 1e-7
    if module is jax_model:
        out, pull_back = jax.vjp(module.divided_by_norm, to_jax(vectors))
        (gradient,) = pull_back(jnp.ones((2, 6)))
    else:
        out = module.divided_by_norm(vectors.requires_grad_())
        (gradient,) = torch.autograd.grad(out.sum(), vectors)
        out = out.detach()
    np.testing.assert_allclose(np.asarray(out), [[0.0] * 6, [1.0] * 6], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(gradient)[0], 6**0.5 * 1e12, rtol=1e-6)


@pytest.mark.parametrize("hidden_size", [*range(2, 12), 1100])
def test_a_kernel_has_the_gradient_of_streams_about_as_short_as_the_least_norm(hidden_size):
    """What shorter ones are divided by does not depend on them, however the least norm is rounded; of any width."""
    config = replace(SMALL, hidden_size=hidden_size)
    shapes = model.connection_shapes(config)
    state = {name: random(*shape, seed=seed, dtype=torch.float32) for seed, (name, shape) in enumerate(shapes.items())}
    streams = random(1, 2, config.num_residual_streams, hidden_size, seed=99, dtype=torch.float32)
    streams *= torch.tensor([1.1e-12, 0.9e-12])[:, None, None] / streams.norm(dim=-1, keepdim=True)

    def gradient(function, dtype):
        leaf = streams.to(dtype).requires_grad_()
        read, *_ = function({name: each.to(dtype) for name, each in state.items()}, leaf)
        return torch.autograd.grad(read.sum(), leaf)[0].double()

    expected = gradient(model.hyper_connection, torch.float64)
    actual = gradient(hyper_connection, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@EACH_CONFIG
def test_a_checkpoint_is_loaded_as_it_is(tmp_path, config):
    state = random_state(config, torch.float32)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    checkpoint = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for each in (checkpoint, states.under("model", checkpoint)):
        loaded = model.load_state(each, config=config)
        assert list(loaded) == list(model.state_shapes(config))
        assert all(torch.equal(loaded[name], entry) for name, entry in state.items())
        assert list(jax_model.load_state(to_jax(each), config=config)) == list(loaded)


@EACH_TWIN
def test_half_precision_is_rounded_once(module):
    narrow = random_state(CLUSTERED, torch.bfloat16)
    inputs = random_inputs(CLUSTERED, dtype=torch.bfloat16)
    wide, wide_inputs = {name: entry.float() for name, entry in narrow.items()}, [inputs[0], inputs[1].float(), *inputs[2:]]
    if module is jax_model:
        wide, wide_inputs = to_jax([wide, wide_inputs])
        narrow = {name: entry.astype(jnp.bfloat16) for name, entry in wide.items()}
        inputs = [wide_inputs[0], wide_inputs[1].astype(jnp.bfloat16), *wide_inputs[2:]]
    calls = (narrow, inputs), (wide, wide_inputs)
    outs = (module.text_latent_mmdit(state, *each, config=CLUSTERED) for state, each in calls)
    for actual, expected in zip(*outs, strict=True):
        assert "bfloat16" in str(actual.dtype) and "float32" in str(expected.dtype)
        rounded = expected.astype(jnp.bfloat16) if module is jax_model else expected.bfloat16()
        assert bool((actual == rounded).all())


@EACH_TWIN
def test_no_text_is_a_call(module):
    state, inputs = random_state(SMALL, torch.float32), random_inputs(SMALL, batch_size=0, dtype=torch.float32)
    if module is jax_model:
        state, inputs = to_jax([state, inputs])
    for mask in (None, inputs[0] == 0):
        out = module.text_latent_mmdit(state, *inputs, mask, config=SMALL)
        assert [each.shape for each in out] == [(0, 8, 40), (0, 1, 5), (0, 8, 0)]


@EACH_TWIN
def test_bad_calls_name_the_argument(module):
    state, inputs = random_state(SMALL, torch.float32), random_inputs(SMALL, dtype=torch.float32)
    if module is jax_model:
        state, inputs = to_jax([state, inputs])
    ids, latents, text_times, latent_times = inputs
    call = functools.partial(module.text_latent_mmdit, config=SMALL)
    head = "text_head.weight"
    for function, message in (
        (lambda: call(state, latents, *inputs[1:]), "text_tokens must be int32 or int64, got float32"),
        (lambda: call(state, ids[0], *inputs[1:]), "text_tokens must be [batch_size, num_tokens], got (8,)"),
        (lambda: call(state, ids[:, :0], *inputs[1:]), "text_tokens must have 1..9 tokens, got 0"),
        (lambda: call(state, ids[:, np.zeros(10, int)], *inputs[1:]), "text_tokens must have 1..9 tokens, got 10"),
        (lambda: call(state, ids + 39, *inputs[1:]), "text_tokens must be in 0..39, got"),
        (lambda: call(state, ids, ids, *inputs[2:]), "latents must be bfloat16 or float16 or float32 or float64, got int"),
        (lambda: call(state, ids, latents[:, None], *inputs[2:]), "latents must be [batch_size=3, latent_dim=5], got (3, 1, 5)"),
        (lambda: call(state, ids, latents, ids[:, 0], latent_times), "text_timesteps must be float32 or float64, got int"),
        (lambda: call(state, ids, latents, text_times, latent_times[:1]), "latent_timesteps must be [batch_size=3], got (1,)"),
        (lambda: call(state, *inputs, ids), "attention_mask must be bool, got int"),
        (lambda: call(state, *inputs, ids[:1] > 0), "attention_mask must be [batch_size=3, num_tokens=8], got (1, 8)"),
        (lambda: call({k: v for k, v in state.items() if k != head}, *inputs), "state must have text_head.weight, got none"),
        (
            lambda: call({**state, head: state[head].T}, *inputs),
            "state must have text_head.weight of shape (40, 24), got (24, 40)",
        ),
        (lambda: call([], *inputs), "state must be a dict of arrays"),
        (lambda: module.load_state({**state, "head": ids}, config=SMALL), "state must have no other entries, got head"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
            function()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be positive, got 0"),
        ({"n_blocks": 0}, "n_blocks must be positive, got 0"),
        ({"cluster_size": -1}, "cluster_size must not be negative, got -1"),
        ({"num_residual_streams": 1}, "num_residual_streams must be at least 2, got 1"),
    ],
)
def test_a_config_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        replace(SMALL, **options)
