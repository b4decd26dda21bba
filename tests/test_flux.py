"""Flux against diffusers' own model, against its twin, and by itself."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from test_references import (
    assert_all_equal_to_rounding,
    assert_equal_to_rounding,
    float32_as_float64,
    jax_value_and_grads,
    random,
    value_and_grads,
)

from gaugeblock.conformance.contracts import flash_attention
from gaugeblock.reference import flux_checkpoints, states
from gaugeblock.reference.configs import FLUX_PRESETS, FluxConfig
from gaugeblock.reference.jax import flux as jax_flux
from gaugeblock.reference.torch import flux

SMALL = FluxConfig(
    in_channels=12, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3, joint_attention_dim=20,
    pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(2, 6, 8),
)  # fmt: skip
CONFIGS = {
    "dev": (SMALL, 3, (6, 10), 7),
    "schnell": (dataclasses.replace(SMALL, guidance_embeds=False, num_layers=1, num_single_layers=3), 1, (10, 2), 3),
    "other-channels-out": (dataclasses.replace(SMALL, out_channels=8, patch_size=2, num_attention_heads=2), 2, (4, 6), 2),
    "one-axis-wider": (dataclasses.replace(SMALL, attention_head_dim=10, axes_dims_rope=(4, 2, 4)), 1, (4, 6), 5),
}


def random_state(config: FluxConfig, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {
        name: (random(*shape, seed=seed) * math.prod(shape[1:]) ** -0.5).to(dtype)
        for seed, (name, shape) in enumerate(flux.state_shapes(config).items())
    }


def random_inputs(
    config: FluxConfig, batch_size: int, size: tuple[int, int], num_text_tokens: int, *, dtype: torch.dtype = torch.float64,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """Return what has gradients, and times, guidances and places; of an image of `size`."""
    latents = random(batch_size, config.in_channels // 4, *size, seed=50, dtype=dtype)
    text = random(batch_size, num_text_tokens, config.joint_attention_dim, seed=51, dtype=dtype)
    pooled = random(batch_size, config.pooled_projection_dim, seed=52, dtype=dtype)
    times = torch.tensor([0.999, 0, 0.25], dtype=dtype)[:batch_size]
    guidance = torch.tensor([3.5, 1, 0], dtype=dtype)[:batch_size]
    return [flux.pack_latents(latents), text, pooled], [times, guidance, flux.image_ids(latents), flux.text_ids(text)]


def to_jax(tensors):
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), tensors)


def value_and_grads_of(module, state, others, config):
    """Return the call as a function of what has gradients, then of the state's entries in their order."""

    def call(hidden_states, encoder_hidden_states, pooled_projections, *leaves):
        leaves = dict(zip(state, leaves, strict=True))
        return module.flux(leaves, hidden_states, encoder_hidden_states, pooled_projections, *others, config=config)

    return call


@pytest.mark.parametrize("name", CONFIGS)
def test_flux_is_that_of_diffusers(name):
    config, *sizes = CONFIGS[name]
    arrays, others = random_inputs(config, *sizes)
    state = random_state(config)
    with float32_as_float64():
        model = FluxTransformer2DModel(**dataclasses.asdict(config)).double().eval()
    assert {key: tuple(entry.shape) for key, entry in model.state_dict().items()} == flux.state_shapes(config)

    def theirs(hidden_states, encoder_hidden_states, pooled_projections, *leaves):
        times, guidance, img_ids, txt_ids = others
        return torch.func.functional_call(
            model,
            dict(zip(state, leaves, strict=True)),
            (hidden_states, encoder_hidden_states, pooled_projections, times, img_ids, txt_ids),
            {"guidance": guidance if config.guidance_embeds else None},
        ).sample

    cotangent = random(sizes[0], arrays[0].shape[1], config.out_features, seed=53)
    with float32_as_float64():
        expected = value_and_grads(theirs, [*arrays, *state.values()], cotangent)
    actual = value_and_grads(value_and_grads_of(flux, state, others, config), [*arrays, *state.values()], cotangent)
    assert actual[0].std() > 0.1
    keys_biases = [place for place, key in enumerate(state) if key.endswith(("to_k.bias", "add_k_proj.bias"))]
    assert all(gradient.abs().max() > 1e-6 for place, gradient in enumerate(expected[4:]) if place not in keys_biases)
    assert_all_equal_to_rounding(actual, expected)


BY_FLASH_ATTENTION = SimpleNamespace(flux=flash_attention.of(flux.flux, flux))


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_flash_attention_changes_rounding_alone(name):
    config, *sizes = CONFIGS[name]
    arrays, others = random_inputs(config, *sizes)
    state = random_state(config)
    cotangent = random(sizes[0], arrays[0].shape[1], config.out_features, seed=53)
    calls = (value_and_grads_of(module, state, others, config) for module in (BY_FLASH_ATTENTION, flux))
    assert_all_equal_to_rounding(*(value_and_grads(call, [*arrays, *state.values()], cotangent) for call in calls))


@pytest.mark.parametrize(("name", "count"), [("FLUX.1-dev", 11_901_408_320), ("FLUX.1-schnell", 11_891_178_560)])
def test_presets_have_the_parameters_of_the_published_models(name, count):
    config = FLUX_PRESETS[name]
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=config.guidance_embeds)
    shapes = flux.state_shapes(config)
    assert {key: tuple(entry.shape) for key, entry in model.state_dict().items()} == shapes == jax_flux.state_shapes(config)
    assert states.num_parameters(shapes) == model.num_parameters() == count


def test_a_checkpoint_of_diffusers_is_taken_as_it_is(tmp_path):
    model = FluxTransformer2DModel(**dataclasses.asdict(SMALL)).eval()
    model.save_pretrained(tmp_path)
    checkpoint = safetensors.torch.load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    config = FluxConfig(**{field.name: model.config[field.name] for field in dataclasses.fields(FluxConfig)})
    assert config == SMALL
    arrays, (times, guidance, img_ids, txt_ids) = random_inputs(SMALL, 2, (4, 6), 5, dtype=torch.float32)
    with torch.no_grad():
        expected = model(*arrays, times, img_ids, txt_ids, guidance).sample
    actual = flux.flux(checkpoint, *arrays, times, guidance, img_ids, txt_ids, config=SMALL)
    assert_equal_to_rounding(actual, expected)


def test_a_checkpoint_of_black_forest_labs_becomes_one_of_diffusers(tmp_path):
    """At the published width, which diffusers' conversion has built in; its matrices have one column here."""
    config = FluxConfig(num_layers=2, num_single_layers=2, guidance_embeds=True)
    shapes = {name: (shape[0], 1) if len(shape) == 2 else shape for name, shape in flux.state_shapes(config).items()}
    original = {
        name: random(*shape, seed=seed)
        for seed, (name, shape) in enumerate(flux_checkpoints.original_shapes(shapes, config).items())
    }
    rows = flux_checkpoints.original_rows(shapes, config)
    ours = {name: torch.cat([original[entry][first:end] for entry, first, end in rows[name]]) for name in shapes}
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_of_another_model_is_refused():
    shapes = flux_checkpoints.original_shapes(flux.state_shapes(SMALL), SMALL)
    original = {name: random(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    loaded, jax_loaded = flux.load_state(original, config=SMALL), jax_flux.load_state(to_jax(original), config=SMALL)
    assert {name: tuple(entry.shape) for name, entry in loaded.items()} == flux.state_shapes(SMALL)
    assert list(flux.load_state(loaded, config=SMALL)) == list(loaded) == list(jax_loaded)
    for name, entry in loaded.items():
        np.testing.assert_array_equal(jax_loaded[name], entry.float())
    qkv = "double_blocks.1.txt_attn.qkv.bias"
    for bad, message in (
        ({name: entry for name, entry in original.items() if name != qkv}, f"state must have {qkv}, got none"),
        (original | {qkv: original[qkv][:-1]}, f"state must have {qkv} of shape .144,., got .143,."),
        (loaded | {"x_embedder.bias": torch.zeros(47)}, "state must have x_embedder.bias of shape .48,., got .47,."),
    ):
        for module, state in ((flux, bad), (jax_flux, to_jax(bad))):
            with pytest.raises(ValueError, match=f"^{message}"):
                module.load_state(state, config=SMALL)


@pytest.mark.parametrize("x64", [False, True])
def test_jax_flux_is_that_of_torch(x64):
    dtype = torch.float64 if x64 else torch.float32
    arrays, (times, _, *ids) = random_inputs(SMALL, 3, (6, 10), 7, dtype=dtype)
    others = [times / 500, times / 250, *ids]  # angles of 999 have 999 units of rounding
    state = random_state(SMALL, dtype)
    cotangent = random(3, 15, 12, seed=53, dtype=dtype)
    leaves = [*arrays, *state.values()]
    expected = value_and_grads(value_and_grads_of(flux, state, others, SMALL), leaves, cotangent)
    with jax.enable_x64(x64):
        function = jax.jit(value_and_grads_of(jax_flux, state, to_jax(others), SMALL))
        assert_all_equal_to_rounding(jax_value_and_grads(function, leaves, cotangent), expected)


def test_half_precision_is_rounded_once():
    arrays, others = random_inputs(SMALL, 2, (4, 6), 5, dtype=torch.float32)
    state = random_state(SMALL, torch.bfloat16)
    arrays = [each.bfloat16() for each in arrays]
    wide = [each.float() for each in arrays]
    expected = flux.flux({name: entry.float() for name, entry in state.items()}, *wide, *others, config=SMALL)
    actual = flux.flux(state, *arrays, *others, config=SMALL)
    assert expected.dtype == torch.float32 and torch.equal(actual, expected.bfloat16())


@pytest.mark.parametrize("module", [flux, jax_flux])
def test_a_model_without_guidance_does_not_read_it(module):
    config = dataclasses.replace(SMALL, guidance_embeds=False)
    arrays, (times, guidance, *ids) = random_inputs(config, 2, (4, 6), 5, dtype=torch.float32)
    state = random_state(config, torch.float32)
    calls = [(state, *arrays, times, guidance * factor, *ids) for factor in (1, math.nan)]
    plain, unread = (module.flux(*(to_jax(call) if module is jax_flux else call), config=config) for call in calls)
    assert bool((plain == unread).all())


@pytest.mark.parametrize("module", [flux, jax_flux])
@pytest.mark.parametrize(("batch_size", "num_text_tokens"), [(0, 5), (2, 0)])
def test_a_batch_or_a_text_may_be_empty(module, batch_size, num_text_tokens):
    arrays, others = random_inputs(SMALL, batch_size, (4, 6), num_text_tokens, dtype=torch.float32)
    call = (random_state(SMALL, torch.float32), *arrays, *others)
    out = module.flux(*(to_jax(call) if module is jax_flux else call), config=SMALL)
    assert tuple(out.shape) == (batch_size, 6, 12) and not bool((out != out).any())


def test_places_far_away_keep_their_digits():
    """Angles are computed in float64: shifting all places by 2^20 turns queries and keys alike, and changes next to nothing."""
    arrays, (times, guidance, img_ids, txt_ids) = random_inputs(SMALL, 1, (4, 6), 5, dtype=torch.float32)
    state = random_state(SMALL, torch.float32)
    near = flux.flux(state, *arrays, times, guidance, img_ids, txt_ids, config=SMALL)
    far = flux.flux(state, *arrays, times, guidance, img_ids + 2**20, txt_ids + 2**20, config=SMALL)
    torch.testing.assert_close(far, near, rtol=0, atol=2e-5)
    assert not torch.allclose(flux.flux(state, *arrays, times, guidance, 3 * img_ids, txt_ids, config=SMALL), near, atol=1e-2)


def test_packed_latents_are_tokens_row_by_row_of_channel_row_column():
    latents = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    tokens = flux.pack_latents(latents)
    assert tokens.shape == (2, 6, 12)
    for token, (_, row, column) in enumerate(flux.image_ids(latents).int().tolist()):
        patch = latents[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert tokens[1, token].tolist() == patch.flatten().tolist()
    assert flux.image_ids(latents)[:, 0].tolist() == [0] * 6 and flux.text_ids(tokens).tolist() == [[0, 0, 0]] * 6
    assert torch.equal(flux.unpack_latents(tokens, height=4, width=6), latents)

    jax_latents = jnp.asarray(latents.numpy())
    np.testing.assert_array_equal(jax_flux.pack_latents(jax_latents), tokens)
    np.testing.assert_array_equal(jax_flux.image_ids(jax_latents), flux.image_ids(latents))
    np.testing.assert_array_equal(jax_flux.text_ids(jax_latents[0]), flux.text_ids(latents[0]))
    np.testing.assert_array_equal(jax_flux.unpack_latents(jnp.asarray(tokens.numpy()), height=4, width=6), latents)


@pytest.mark.parametrize("module", [flux, jax_flux])
def test_bad_calls_name_the_argument(module):
    zeros = jnp.zeros if module is jax_flux else torch.zeros
    for spoilt, message in (
        (zeros((1, 3, 4, 5)), "latents must have an even height and width, got"),
        (zeros((3, 4, 4)), "latents must be "),
    ):
        for function in (module.pack_latents, module.image_ids):
            with pytest.raises(ValueError, match=f"^{message}"):
                function(spoilt)
    for tokens, height, message in (
        (zeros((1, 6, 12)), 5, "height must be even, got 5"),
        (zeros((1, 5, 12)), 4, r"tokens must be \[batch_size, num_tokens=6, channels\], got"),
        (zeros((1, 6, 13)), 4, "tokens must have 4 features for each channel"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            module.unpack_latents(tokens, height=height, width=6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"out_channels": 0}, "out_channels must be positive or None, got 0"),
        ({"axes_dims_rope": (3, 5, 8)}, r"axes_dims_rope must be even and positive, got \(3, 5, 8\)"),
        ({"axes_dims_rope": [2, 6, 6]}, r"axes_dims_rope must add up to attention_head_dim=16, got \(2, 6, 6\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(SMALL, **change)
