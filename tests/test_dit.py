"""DiT and its layers against diffusers' and torch's own modules, against their twins, and by themselves."""

import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from test_references import (
    assert_all_equal_to_rounding,
    assert_equal_to_rounding,
    float32_as_float64,
    jax_value_and_grads,
    random,
    value_and_grads,
)

from gaugeblock.reference.configs import DIT_PRESETS, DiTConfig
from gaugeblock.reference.jax import dit as jax_dit
from gaugeblock.reference.jax import layers as jax_layers
from gaugeblock.reference.torch import dit, layers

SMALL = DiTConfig(input_size=8, hidden_size=24, depth=2, num_heads=3, num_classes=5)


def model_of_diffusers(config: DiTConfig) -> DiTTransformer2DModel:
    """Return diffusers' model in float64 with random weights and one embedding, which every block shares."""
    with float32_as_float64():
        model = DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            sample_size=config.input_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=config.num_classes,
            norm_eps=config.norm_eps,
        )
    for each in model.transformer_blocks:
        each.norm1.emb = model.transformer_blocks[0].norm1.emb
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = random(*parameter.shape, seed=seed) * parameter[0].numel() ** -0.5
    return model.double().eval()


def random_state(config: DiTConfig, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    shapes = dit.state_shapes(config)
    return {
        name: (random(*shape, seed=seed) * math.prod(shape[1:]) ** -0.5).to(dtype)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def random_inputs(config: DiTConfig, dtype: torch.dtype = torch.float64, last_time: float = 999) -> list[torch.Tensor]:
    latents = random(3, config.in_channels, config.input_size, config.input_size, seed=50, dtype=dtype)
    return [latents, torch.tensor([0, last_time - 0.25, last_time], dtype=dtype), torch.tensor([0, config.num_classes, 3])]


def cotangent_of(config: DiTConfig, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return random(3, config.out_channels, config.input_size, config.input_size, seed=51, dtype=dtype)


def to_jax(tensors):
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), tensors)


@pytest.mark.parametrize(("patch_size", "learn_sigma"), [(2, True), (4, False), (1, True)])
def test_dit_is_that_of_diffusers(patch_size, learn_sigma):
    config = DiTConfig(
        input_size=8, patch_size=patch_size, hidden_size=24, depth=2, num_heads=3, num_classes=5, learn_sigma=learn_sigma,
        norm_eps=1e-2, frequency_shift=1,
    )  # fmt: skip
    model, (latents, timesteps, labels), cotangent = model_of_diffusers(config), random_inputs(config), cotangent_of(config)
    latents.requires_grad_()
    with float32_as_float64():
        expected = model(latents, timesteps, labels).sample
    gradients = torch.autograd.grad(expected, [latents, *model.parameters()], cotangent)
    by_parameter = dict(zip(model.parameters(), gradients[1:], strict=True))
    by_name = {name: by_parameter[parameter] for name, parameter in model.state_dict(keep_vars=True).items()}
    expected_gradients = [gradients[0], *dit.load_state(by_name, config=config).values()]

    state = dit.load_state(model.state_dict(), config=config)
    actual, *actual_gradients = value_and_grads(
        lambda latents, *leaves: dit.dit(dict(zip(state, leaves, strict=True)), latents, timesteps, labels, config=config),
        [latents, *state.values()],
        cotangent,
    )
    assert_equal_to_rounding(actual, expected.detach())
    assert min(gradient.abs().max() for gradient in expected_gradients) > 1e-3
    assert_all_equal_to_rounding(actual_gradients, expected_gradients)


@pytest.mark.parametrize(
    ("name", "millions", "exactly"),
    [
        ("DiT-S/2", 33, 32_865_056),
        ("DiT-B/2", 130, 130_315_808),
        ("DiT-L/2", 458, 457_840_672),
        ("DiT-XL/2", 675, 674_834_720),
    ],
)
def test_presets_have_as_many_parameters_as_the_paper_says(name, millions, exactly):
    count = sum(math.prod(shape) for shape in dit.state_shapes(DIT_PRESETS[name]).values())
    assert count == exactly
    assert round(count / 1e6) == millions


def test_patch_size_changes_the_ends_alone():
    for name, config in DIT_PRESETS.items():
        smallest = dit.state_shapes(DIT_PRESETS[f"{name[:-1]}2"])
        changed = {key.split(".")[0] for key, shape in dit.state_shapes(config).items() if shape != smallest[key]}
        assert changed <= {"x_embedder", "final_layer"}


def test_diffusers_counts_an_embedding_for_each_block():
    config = DIT_PRESETS["DiT-XL/2"]
    with torch.device("meta"):
        model = DiTTransformer2DModel(out_channels=config.out_channels)
    assert model.num_parameters() == 749_826_464
    copies = (config.depth - 1) * sum(
        math.prod(shape) for name, shape in dit.state_shapes(config).items() if name.startswith(("t_embedder", "y_embedder"))
    )
    assert model.num_parameters() - copies == sum(math.prod(shape) for shape in dit.state_shapes(config).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_the_paper_survives_the_file(tmp_path, dtype):
    state = random_state(SMALL, dtype)
    table = layers.sincos_position_embedding(4, like=state["x_embedder.proj.bias"])[None]
    safetensors.torch.save_file({"pos_embed": table} | state, tmp_path / "dit.safetensors")
    checkpoint = safetensors.torch.load_file(tmp_path / "dit.safetensors")
    loaded = dit.load_state(checkpoint, config=SMALL)
    assert list(loaded) == list(state)
    for name, entry in state.items():
        assert loaded[name].dtype == dtype and torch.equal(loaded[name], entry)

    if dtype == torch.float32:
        jax_loaded = jax_dit.load_state(to_jax(checkpoint), config=SMALL)
        assert list(jax_loaded) == list(state)
        for name, entry in state.items():
            np.testing.assert_array_equal(jax_loaded[name], entry)


def test_a_checkpoint_of_diffusers_becomes_one_of_the_paper(tmp_path):
    model = model_of_diffusers(SMALL).float()
    entries = {name: entry.clone() for name, entry in model.state_dict().items()}  # a file has no shared memory
    safetensors.torch.save_file(entries, tmp_path / "diffusers.safetensors")
    checkpoint = safetensors.torch.load_file(tmp_path / "diffusers.safetensors")
    loaded = dit.load_state(checkpoint, config=SMALL)
    jax_loaded = jax_dit.load_state(to_jax(checkpoint), config=SMALL)
    assert list(loaded) == list(jax_loaded) == list(dit.state_shapes(SMALL))
    for name, entry in dit.load_state(model.state_dict(), config=SMALL).items():
        assert torch.equal(loaded[name], entry)
        np.testing.assert_array_equal(jax_loaded[name], entry)


def checkpoint_of_diffusers() -> dict[str, torch.Tensor]:
    return {name: entry.clone() for name, entry in model_of_diffusers(SMALL).state_dict().items()}


EMBEDDING = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda paper, _: {k: v for k, v in paper.items() if k != "blocks.1.attn.qkv.bias"}, "blocks.1.attn.qkv.bias"),
        (lambda paper, _: paper | {"blocks.2.attn.qkv.bias": torch.zeros(1)}, "blocks.2.attn.qkv.bias"),
        (
            lambda paper, _: paper | {"blocks.0.attn.qkv.weight": torch.zeros(72, 23)},
            "blocks.0.attn.qkv.weight of shape (72, 24), got (72, 23)",
        ),
        (lambda paper, _: paper | {"pos_embed": torch.zeros(1, 16, 24)}, "the fixed position table or none"),
        (lambda paper, _: paper | {"pos_embed": torch.full((1, 16, 24), torch.nan)}, "the fixed position table or none"),
        (lambda paper, _: paper | {"pos_embed": torch.zeros(1, 64, 24)}, "of shape (1, 16, 24), got (1, 64, 24)"),
        (lambda _, other: other | {"proj_out_3.bias": torch.zeros(1)}, "proj_out_3.bias"),
        (lambda _, other: {k: v for k, v in other.items() if k != "proj_out_1.bias"}, "proj_out_1.bias"),
        (lambda _, other: other | {"transformer_blocks.0.attn1.to_q.bias": torch.zeros(72)}, "of shape (24,), got (72,)"),
        (lambda _, other: other | {EMBEDDING: torch.zeros(24)}, f"{EMBEDDING} equal to {EMBEDDING.replace('1', '0', 1)}"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(spoil, message):
    bad = spoil(random_state(SMALL, torch.float32), checkpoint_of_diffusers())
    for module, checkpoint in ((dit, bad), (jax_dit, to_jax(bad))):
        with pytest.raises(ValueError, match=f"^state must .*{re.escape(message)}"):
            module.load_state(checkpoint, config=SMALL)


@pytest.mark.parametrize("x64", [False, True])
def test_jax_dit_is_that_of_torch(x64):
    dtype = torch.float64 if x64 else torch.float32
    state, (latents, timesteps, labels), cotangent = (
        random_state(SMALL, dtype),
        random_inputs(SMALL, dtype, last_time=2),  # angles of 999 have 999 units of rounding
        cotangent_of(SMALL, dtype),
    )
    arrays = [latents, *state.values()]
    expected = value_and_grads(
        lambda latents, *leaves: dit.dit(dict(zip(state, leaves, strict=True)), latents, timesteps, labels, config=SMALL),
        arrays,
        cotangent,
    )
    with jax.enable_x64(x64):
        jax_timesteps, jax_labels = to_jax([timesteps, labels])

        @jax.jit
        def function(latents, *leaves):
            return jax_dit.dit(dict(zip(state, leaves, strict=True)), latents, jax_timesteps, jax_labels, config=SMALL)

        assert_all_equal_to_rounding(jax_value_and_grads(function, arrays, cotangent), expected)


def test_half_precision_is_rounded_once():
    state, (latents, timesteps, labels) = random_state(SMALL, torch.bfloat16), random_inputs(SMALL, torch.float32)
    latents = latents.bfloat16()
    out = dit.dit(state, latents, timesteps, labels, config=SMALL)
    wide_state = {name: entry.float() for name, entry in state.items()}
    assert torch.equal(out, dit.dit(wide_state, latents.float(), timesteps, labels, config=SMALL).bfloat16())


def test_training_begins_with_the_identity():
    config = DiTConfig(input_size=8, hidden_size=48, depth=2, num_heads=3, num_classes=99)
    state, inputs = dit.initial_state(config, seed=7), random_inputs(config, torch.float32)
    hidden, conditioning = random(3, 16, 48, seed=0).float(), random(3, 48, seed=1).float()
    assert torch.equal(dit.block(dit.block_state(state, 1), hidden, conditioning, config=config), hidden)
    assert not dit.dit(state, *inputs, config=config).any()

    bound = math.sqrt(6 / (48 + 3 * 48))
    assert 0.99 * bound < state["blocks.0.attn.qkv.weight"].abs().max() <= bound
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], state["blocks.1.attn.qkv.weight"])
    assert 0.019 < state["y_embedder.embedding_table.weight"].std() < 0.021
    jax_state = jax_dit.initial_state(config, seed=7)
    assert list(jax_state) == list(state)
    for name, entry in state.items():
        np.testing.assert_array_equal(jax_state[name], entry)


def test_every_preset_can_be_looked_up():
    assert len(DIT_PRESETS) == 12
    with pytest.raises(ValueError, match=r"^hidden_size must be a multiple of 5, got 24"):
        DiTConfig(hidden_size=24, num_heads=5)


# --------------------------------------------------------------------------------------------------------------- layers

TOKENS = [random(2, 16, 24, seed=0), random(2, 16, 24, seed=1)]
STEERING = [random(2, 24, seed=seed) for seed in (2, 3, 4)]
ATTENTION = [random(*shape, seed=seed) for seed, shape in enumerate([(72, 24), (72,), (24, 24), (24,)])]
MLP = [random(*shape, seed=seed) for seed, shape in enumerate([(40, 24), (40,), (24, 40), (24,)])]
IMAGES = random(2, 3, 8, 12, seed=5)

CALLS = {
    "layer_norm_modulate": ([TOKENS[0], *STEERING[:2]], {"eps": 1e-3}),
    "gated_residual": ([*TOKENS, STEERING[0]], {}),
    "self_attention": ([TOKENS[0], *ATTENTION], {"num_heads": 3}),
    "gelu_mlp": ([TOKENS[0], *MLP], {}),
    "timestep_embedding": ([torch.tensor([0, 0.5, 2]).double()], {"embedding_size": 256, "frequency_shift": 0}),
    "patchify": ([IMAGES], {"patch_size": 2}),
    "unpatchify": ([TOKENS[0]], {"patch_size": 2}),
}


def attention_of_torch(hidden_states, qkv_weight, qkv_bias, proj_weight, proj_bias, *, num_heads):
    attention = torch.nn.MultiheadAttention(24, num_heads, batch_first=True, dtype=torch.float64)
    parts = {"in_proj_weight": qkv_weight, "in_proj_bias": qkv_bias, "out_proj.weight": proj_weight, "out_proj.bias": proj_bias}
    return torch.func.functional_call(attention, parts, (hidden_states,) * 3, {"need_weights": False})[0]


def mlp_of_diffusers(hidden_states, *weights):
    mlp = FeedForward(24, inner_dim=40, activation_fn="gelu-approximate").double()
    names = [name for name, _ in mlp.named_parameters()]
    return torch.func.functional_call(mlp, dict(zip(names, weights, strict=True)), (hidden_states,))


def timesteps_of_diffusers(timesteps, *, embedding_size, frequency_shift):
    with float32_as_float64():
        return get_timestep_embedding(timesteps, embedding_size, flip_sin_to_cos=True, downscale_freq_shift=frequency_shift)


OTHERS = {
    "layer_norm_modulate": lambda x, shift, scale, *, eps: (
        torch.nn.functional.layer_norm(x, (24,), eps=eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    ),
    "gated_residual": lambda x, branch, gate: torch.addcmul(x, branch, gate.unsqueeze(1)),
    "self_attention": attention_of_torch,
    "gelu_mlp": mlp_of_diffusers,
    "timestep_embedding": timesteps_of_diffusers,
    "patchify": lambda images, *, patch_size: torch.nn.functional.unfold(images, patch_size, stride=patch_size).mT,
    "unpatchify": lambda patches, *, patch_size: torch.nn.functional.fold(
        patches.unflatten(2, (patch_size**2, -1)).mT.flatten(2).mT, 4 * patch_size, patch_size, stride=patch_size
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_layers_are_those_of_torch_and_diffusers_and_their_twins(name):
    arrays, options = CALLS[name]
    function, other, twin = getattr(layers, name), OTHERS[name], getattr(jax_layers, name)
    cotangent = random(*function(*arrays, **options).shape, seed=9)
    actual = value_and_grads(lambda *leaves: function(*leaves, **options), arrays, cotangent)
    assert_all_equal_to_rounding(actual, value_and_grads(lambda *leaves: other(*leaves, **options), arrays, cotangent))
    with jax.enable_x64(True):
        of_jax = jax_value_and_grads(jax.jit(lambda *leaves: twin(*leaves, **options)), arrays, cotangent)
        assert_all_equal_to_rounding(of_jax, actual)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_fused_residual_norm_is_its_two_parts_with_the_sum_unrounded(dtype):
    residual, branch, gate, shift, scale = (each.to(dtype) for each in (*TOKENS, *STEERING))
    hidden_states, modulated = layers.gated_residual_layer_norm_modulate(residual, branch, gate, shift, scale, eps=1e-6)
    wide = [each.double() if dtype is torch.float64 else each.float() for each in (residual, branch, gate, shift, scale)]
    unrounded = layers.gated_residual(*wide[:3])
    assert torch.equal(hidden_states, unrounded.to(dtype))
    assert torch.equal(modulated, layers.layer_norm_modulate(unrounded, *wide[3:], eps=1e-6).to(dtype))
    with jax.enable_x64(dtype is torch.float64):
        if dtype is torch.float64:
            arrays = to_jax([residual, branch, gate, shift, scale])
            of_jax = jax_layers.gated_residual_layer_norm_modulate(*arrays, eps=1e-6)
            assert_all_equal_to_rounding(list(of_jax), [hidden_states, modulated])


@pytest.mark.parametrize(("grid_size", "hidden_size"), [(4, 24), (16, 1152), (1, 4)])
def test_the_position_table_is_that_of_diffusers(grid_size, hidden_size):
    expected = get_2d_sincos_pos_embed(hidden_size, grid_size, base_size=grid_size)
    actual = layers.sincos_position_embedding(grid_size, like=torch.zeros(hidden_size, dtype=torch.float64))
    assert_equal_to_rounding(actual, expected)
    table = layers.sincos_position_embedding(grid_size, like=torch.zeros(hidden_size))
    assert torch.equal(table, actual.float())
    np.testing.assert_array_max_ulp(jax_layers.sincos_position_embedding(grid_size, like=jnp.zeros(hidden_size)), table, 1)


@pytest.mark.parametrize("module", [layers, jax_layers])
@pytest.mark.parametrize("name", CALLS)
def test_bad_calls_of_layers_name_the_argument(name, module):
    function, (tensors, options) = getattr(module, name), CALLS[name]
    arrays = to_jax(tensors) if module is jax_layers else tensors
    for place, argument in enumerate([*inspect.signature(function).parameters][: len(arrays)]):
        array = arrays[place]
        for wrong in (array[0], array > 0, None):
            with pytest.raises((TypeError, ValueError), match=rf"^{argument} must "):
                function(*arrays[:place], wrong, *arrays[place + 1 :], **options)
    for option in options:
        with pytest.raises(TypeError, match=rf"^{option} must "):
            function(*arrays, **options | {option: "2"})


@pytest.mark.parametrize("module", [layers, jax_layers])
def test_a_position_table_is_like_an_array_whose_width_is_a_multiple_of_4(module):
    for shape in ((), (6,)):
        with pytest.raises(ValueError, match=r"^like must "):
            module.sincos_position_embedding(2, like=jnp.zeros(shape) if module is jax_layers else torch.zeros(shape))


@pytest.mark.parametrize("module", [layers, jax_layers])
@pytest.mark.parametrize("name", [each for each in CALLS if each != "timestep_embedding"])
def test_layers_compute_in_float32_and_round_once(name, module):
    function, (tensors, options) = getattr(module, name), CALLS[name]
    wide = [each.bfloat16().float() for each in tensors]
    arrays = to_jax(wide) if module is jax_layers else wide
    dtype = jnp.bfloat16 if module is jax_layers else torch.bfloat16
    narrow = [each.astype(dtype) if module is jax_layers else each.to(dtype) for each in arrays]
    actual, expected = function(*narrow, **options), function(*arrays, **options)
    assert actual.dtype == dtype and expected.dtype == arrays[0].dtype
    assert bool((actual == (expected.astype(dtype) if module is jax_layers else expected.to(dtype))).all())


@pytest.mark.parametrize("module", [dit, jax_dit])
def test_a_block_computes_in_float32_and_rounds_once(module):
    state = dit.block_state(random_state(SMALL, torch.bfloat16), 0)
    wide = [{name: each.float() for name, each in state.items()}, *(each.bfloat16().float() for each in (TOKENS[0], STEERING[0]))]
    arrays = to_jax(wide) if module is jax_dit else wide
    narrow = jax.tree.map(lambda each: each.astype(jnp.bfloat16) if module is jax_dit else each.bfloat16(), arrays)
    actual, expected = module.block(*narrow, config=SMALL), module.block(*arrays, config=SMALL)
    assert "bfloat16" in str(actual.dtype) and "float32" in str(expected.dtype)
    assert bool((actual == (expected.astype(jnp.bfloat16) if module is jax_dit else expected.bfloat16())).all())


def test_times_of_low_precision_are_refused():
    for module, array in ((layers, torch.zeros(2).bfloat16()), (jax_layers, jnp.zeros(2, jnp.bfloat16))):
        with pytest.raises(TypeError, match=r"^timesteps must be float32 or float64, got bfloat16"):
            module.timestep_embedding(array, embedding_size=8, frequency_shift=0)
