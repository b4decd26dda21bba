"""AutoencoderKL against diffusers' own, against its twin, and by itself."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # transformers imports triton, which then decorates

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from agreement import assert_agree
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from test_references import assert_equal_to_rounding, jax_value_and_grads, random, value_and_grads

from gaugeblock.reference import states
from gaugeblock.reference.configs import VAE_PRESETS, VAEConfig
from gaugeblock.reference.jax import vae as jax_vae
from gaugeblock.reference.torch import vae

# sizes that differ pairwise, so that none can stand for another
SMALL = VAEConfig(
    in_channels=2, out_channels=5, latent_channels=3, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2
)
DEEP = VAEConfig(block_out_channels=(6, 12, 9), layers_per_block=2, norm_num_groups=3, mid_block_add_attention=False)
BARE = VAEConfig(latent_channels=7, block_out_channels=(4,), norm_num_groups=2, use_quant_conv=False, use_post_quant_conv=False)
CONFIGS = {"small": SMALL, "deep": DEEP, "bare": BARE}
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
EACH_TWIN = pytest.mark.parametrize("module", [vae, jax_vae], ids=["torch", "jax"])


def of_diffusers(config: VAEConfig) -> AutoencoderKL:
    """Return diffusers' model with the parameters that it draws itself."""
    levels = len(config.block_out_channels)
    names = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
    options = ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv", "scaling_factor", "shift_factor")
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **{name: getattr(config, name) for name in names + options},
    ).eval()


@functools.cache
def model_of_diffusers(config: VAEConfig) -> AutoencoderKL:
    """Return diffusers' model in float64 with random weights, none of which is 0 or 1."""
    model = of_diffusers(config).double()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = random(*parameter.shape, seed=seed) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    return model


def images_of(config: VAEConfig, batch_size: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return random(batch_size, config.in_channels, height, width, seed=50, dtype=dtype)


def latents_of(config: VAEConfig, batch_size: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return random(batch_size, config.latent_channels, height, width, seed=51, dtype=dtype)


def to_jax(tensors):
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), tensors)


def of_state(call, state: dict[str, torch.Tensor]):
    """Return a function of one array, which may come in two parts, and of the state's entries."""

    def function(inputs, *entries):
        out = call(dict(zip(state, entries, strict=True)), inputs)
        return out if not isinstance(out, tuple) else (jnp if isinstance(out[0], jax.Array) else torch).concatenate(out, 1)

    return function


def by_name(state: dict[str, torch.Tensor], out, of_inputs, *of_entries) -> dict:
    return {"out": out, "inputs": of_inputs, **dict(zip(state, of_entries, strict=True))}


def assert_is_that_of_diffusers(call, state: dict[str, torch.Tensor], inputs: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare outputs, and gradients of inputs and parameters; `expected` was computed with those of the state."""
    cotangent = random(*expected.shape, seed=52)
    gradients = torch.autograd.grad(expected, [inputs, *state.values()], cotangent)
    actual = value_and_grads(of_state(call, state), [inputs, *state.values()], cotangent)
    results = by_name(state, expected.detach(), *gradients)
    assert all(each.abs().max() > 1e-5 for name, each in results.items() if not name.endswith("to_k.bias"))
    assert_agree(by_name(state, *actual), results)


def parameters_of(model: AutoencoderKL, shapes: states.Shapes) -> dict[str, torch.Tensor]:
    return {name: model.get_parameter(name) for name in shapes}


@EACH_CONFIG
@pytest.mark.parametrize(("batch_size", "height", "width"), [(1, 5, 7), (3, 8, 6)])
def test_encode_is_that_of_diffusers(config, batch_size, height, width):
    model, images = model_of_diffusers(config), images_of(config, batch_size, height, width).requires_grad_()
    posterior = model.encode(images).latent_dist
    assert posterior.mean.shape[2:] == (height // config.downsampling, width // config.downsampling)
    state = parameters_of(model, vae.encoder_shapes(config))
    expected = torch.cat([posterior.mean, posterior.logvar], 1)
    assert_is_that_of_diffusers(functools.partial(vae.encode, config=config), state, images, expected)


@EACH_CONFIG
@pytest.mark.parametrize(("batch_size", "height", "width"), [(1, 2, 3), (3, 3, 1)])
def test_decode_is_that_of_diffusers(config, batch_size, height, width):
    model, latents = model_of_diffusers(config), latents_of(config, batch_size, height, width).requires_grad_()
    expected = model.decode(latents).sample
    assert expected.shape[2:] == (height * config.downsampling, width * config.downsampling)
    state = parameters_of(model, vae.decoder_shapes(config))
    assert_is_that_of_diffusers(functools.partial(vae.decode, config=config), state, latents, expected)


def test_log_variances_and_samples_are_those_of_diffusers():
    model = model_of_diffusers(BARE)
    state, images, noise = dict(model.state_dict()), images_of(BARE, 2, 5, 4), latents_of(BARE, 2, 5, 4)
    state["encoder.conv_out.bias"] = torch.linspace(-60, 60, 14).double()  # of means, then of log variances
    mean, logvar = vae.encode(state, images, config=BARE)
    moments = torch.func.functional_call(model.encoder, states.part(state, "encoder"), (images,))
    posterior = DiagonalGaussianDistribution(moments)
    assert_equal_to_rounding(logvar, posterior.logvar.detach())
    assert (logvar == 20).any() and (logvar < 20).any() and mean.min() < -30
    wide = torch.linspace(-50, 50, mean.numel()).double().reshape(mean.shape)
    posterior = DiagonalGaussianDistribution(torch.cat([mean, wide], 1))
    clamped = posterior.logvar
    assert clamped.min() == vae.SMALLEST_LOGVAR and clamped.max() == vae.LARGEST_LOGVAR
    samples = vae.sample(mean, clamped, noise)
    assert_equal_to_rounding(samples, posterior.mean + posterior.std * noise)
    with jax.enable_x64(True):
        assert_equal_to_rounding(jax_vae.sample(*to_jax([mean, clamped, noise])), samples)


@EACH_TWIN
def test_log_variances_are_clamped_at_both_ends(module):
    state = {name: entry.float() for name, entry in model_of_diffusers(BARE).state_dict().items()}
    state["encoder.conv_out.bias"] = torch.tensor([0.0] * 7 + [-90, -60, -25, 0, 15, 60, 90])
    images = images_of(BARE, 2, 5, 4).float()
    arguments = to_jax([state, images]) if module is jax_vae else (state, images)
    _, logvar = (np.asarray(each) for each in module.encode(*arguments, config=BARE))
    assert (logvar[:, :2] == -30).all() and (logvar[:, 5:] == 20).all()
    assert np.unique(logvar[:, 2:5]).size > 100


@EACH_TWIN
@pytest.mark.parametrize("name", ["stable-diffusion-xl", "stable-diffusion-3", "flux"])
def test_latents_are_shifted_and_then_scaled(name, module):
    config = VAE_PRESETS[name]
    latents = latents_of(config, 2, 3, 1, torch.float32)
    expected = (latents - config.shift_factor) * config.scaling_factor
    array = to_jax(latents) if module is jax_vae else latents
    scaled = module.scale_latents(array, config=config)
    assert_equal_to_rounding(scaled, expected)
    assert_equal_to_rounding(module.unscale_latents(scaled, config=config), latents)


# scaling, shift and channels as the checkpoints' configurations have them, and the number of parameters
PUBLISHED = {
    "stable-diffusion-1": (0.18215, 0, 4, 83_653_863),
    "stable-diffusion-2": (0.18215, 0, 4, 83_653_863),
    "stable-diffusion-xl": (0.13025, 0, 4, 83_653_863),
    "stable-diffusion-3": (1.5305, 0.0609, 16, 83_819_683),
    "flux": (0.3611, 0.1159, 16, 83_819_683),
}


@pytest.mark.parametrize("name", VAE_PRESETS)
def test_presets_are_the_published_models(name):
    config = VAE_PRESETS[name]
    *factors, channels, count = PUBLISHED[name]
    assert [config.scaling_factor, config.shift_factor, config.latent_channels] == [*factors, channels]
    assert states.num_parameters(vae.state_shapes(config)) == count
    with torch.device("meta"):
        model = of_diffusers(config)
    assert model.num_parameters() == count
    assert {name: tuple(each.shape) for name, each in model.named_parameters()} == vae.state_shapes(config)


@pytest.mark.parametrize("deprecated", [False, True])
def test_a_checkpoint_of_diffusers_gives_its_images(tmp_path, deprecated):
    model = of_diffusers(SMALL)
    model.save_pretrained(tmp_path)
    checkpoint = safetensors.torch.load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    if deprecated:
        names = {f".{new}.": f".{old}." for old, new in vae.DEPRECATED_NAMES.items()}
        pattern = "|".join(map(re.escape, names))
        checkpoint = {re.sub(pattern, lambda found: names[found[0]], name): each for name, each in checkpoint.items()}
        assert "decoder.mid_block.attentions.0.proj_attn.bias" in checkpoint
    state = vae.load_state(checkpoint, config=SMALL)
    assert list(state) == list(vae.state_shapes(SMALL))
    wide = {name: entry.double() for name, entry in state.items()}
    images, latents = images_of(SMALL, 2, 6, 5), latents_of(SMALL, 2, 3, 2)
    with torch.no_grad():
        model.double()
        posterior, decoded = model.encode(images).latent_dist, model.decode(latents).sample
    actual = (*vae.encode(wide, images, config=SMALL), vae.decode(wide, latents, config=SMALL))
    names, expected = ("mean", "logvar", "out"), (posterior.mean, posterior.logvar, decoded)
    assert_agree(dict(zip(names, actual, strict=True)), dict(zip(names, expected, strict=True)))
    jax_state = jax_vae.load_state(to_jax(checkpoint), config=SMALL)
    assert list(jax_state) == list(state)
    for name, entry in state.items():
        np.testing.assert_array_equal(jax_state[name], entry)


@EACH_CONFIG
def test_twins_agree(config):
    state = dict(model_of_diffusers(config).state_dict())
    calls = {
        "encode": (vae.encoder_shapes(config), images_of(config, 2, 9, 5)),
        "decode": (vae.decoder_shapes(config), latents_of(config, 2, 1, 2)),
    }
    for name, (shapes, inputs) in calls.items():
        own = {each: state[each] for each in shapes}
        ours, theirs = (of_state(functools.partial(getattr(module, name), config=config), own) for module in (vae, jax_vae))
        cotangent = random(*ours(inputs, *own.values()).shape, seed=53)
        expected = value_and_grads(ours, [inputs, *own.values()], cotangent)
        with jax.enable_x64(True):
            actual = jax_value_and_grads(jax.jit(theirs), [inputs, *own.values()], cotangent)
        assert_agree(by_name(own, *actual), by_name(own, *expected))


@EACH_TWIN
@pytest.mark.parametrize("name", ["encode", "decode"])
def test_half_precision_is_rounded_once(name, module):
    state = {name: entry.bfloat16() for name, entry in model_of_diffusers(SMALL).state_dict().items()}
    inputs = (images_of if name == "encode" else latents_of)(SMALL, 2, 4, 6).bfloat16()
    wide = {name: entry.float() for name, entry in state.items()}, inputs.float()
    if module is jax_vae:
        wide = to_jax(wide)
    narrow = jax.tree.map(lambda each: each.astype(jnp.bfloat16), wide) if module is jax_vae else (state, inputs)
    call = functools.partial(getattr(module, name), config=SMALL)
    for actual, expected in zip(jax.tree.leaves(call(*narrow)), jax.tree.leaves(call(*wide)), strict=True):
        assert "bfloat16" in str(actual.dtype) and "float32" in str(expected.dtype)
        rounded = expected.astype(jnp.bfloat16) if module is jax_vae else expected.bfloat16()
        assert bool((actual == rounded).all())


@EACH_TWIN
def test_no_image_is_a_call(module):
    state = dict(model_of_diffusers(SMALL).state_dict())
    calls = {"encode": (images_of(SMALL, 0, 5, 6), (0, 3, 2, 3)), "decode": (latents_of(SMALL, 0, 2, 3), (0, 5, 4, 6))}
    for name, (inputs, shape) in calls.items():
        with jax.enable_x64(True):
            arguments = to_jax([state, inputs]) if module is jax_vae else (state, inputs)
            out = getattr(module, name)(*arguments, config=SMALL)
        assert {each.shape for each in jax.tree.leaves(out)} == {shape}


@EACH_TWIN
def test_bad_calls_name_the_argument(module):
    state = {name: entry.float() for name, entry in model_of_diffusers(SMALL).state_dict().items()}
    images, latents = images_of(SMALL, 2, 5, 6, torch.float32), latents_of(SMALL, 2, 3, 2, torch.float32)
    if module is jax_vae:
        state, images, latents = to_jax([state, images, latents])
    without = {name: entry for name, entry in state.items() if name != "decoder.conv_in.bias"}
    for call, message in (
        (lambda: module.encode(state, images[:, :1], config=SMALL), "images must be [batch_size, in_channels=2, height, width]"),
        (lambda: module.encode(state, images[:, :, :1], config=SMALL), "images must be at least 2 pixels high and wide"),
        (lambda: module.encode(None, images, config=SMALL), "state must be a dict of arrays"),
        (lambda: module.decode(without, latents, config=SMALL), "state must have decoder.conv_in.bias"),
        (lambda: module.decode(state, latents[:, :, :0], config=SMALL), "latents must be at least 1 place high and wide"),
        (lambda: module.decode(state, images, config=SMALL), "latents must be [batch_size, latent_channels=3, height, width]"),
        (lambda: module.load_state(without, config=SMALL), "state must have decoder.conv_in.bias"),
        (lambda: module.load_state(state | {"logvar": images}, config=SMALL), "state must have no other entries, got logvar"),
        (lambda: module.sample(latents, latents, latents[:1]), "noise must be"),
        (lambda: module.sample(latents, images, latents), "logvar must be"),
        (lambda: module.scale_latents(images, config=SMALL), "latents must be"),
        (lambda: module.unscale_latents(images, config=SMALL), "latents must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_channels": 0}, "latent_channels must be positive, got 0"),
        ({"block_out_channels": (128, 144)}, "block_out_channels must be multiples of norm_num_groups=32, got (128, 144)"),
        ({"block_out_channels": ()}, "block_out_channels must be multiples"),
        ({"block_out_channels": [128]}, "block_out_channels must be a tuple, got [128]"),
        ({"scaling_factor": 0.0}, "scaling_factor must not be 0"),
        ({"shift_factor": float("nan")}, "shift_factor must be finite, got nan"),
    ],
)
def test_a_config_that_cannot_be_is_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        VAEConfig(**options)
