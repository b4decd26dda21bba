"""MMDiT against diffusers' own module, against its twin, and by itself."""

import math
import random as python_random
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from test_references import (
    assert_all_equal_to_rounding,
    assert_equal_to_rounding,
    float32_as_float64,
    jax_value_and_grads,
    random,
    value_and_grads,
)

from gaugeblock.optimized.compiled.mmdit import mmdit_by_library
from gaugeblock.reference import states
from gaugeblock.reference.configs import MMDIT_PRESETS, MMDiTConfig
from gaugeblock.reference.jax import layers as jax_layers
from gaugeblock.reference.jax import mmdit as jax_mmdit
from gaugeblock.reference.torch import layers, mmdit

RELATIVE = 1e-10  # of a gradient's largest element: float64 keeps 1e-16, of which sums and what cancels in them lose some digits
PUBLISHED = {"sd3-medium": 2_028_328_000, "sd3.5-large": 8_056_627_520, "sd3.5-medium": 2_243_171_520}


def small(**others) -> MMDiTConfig:
    """Dimensions of which no two are equal, but for what must be."""
    sizes = {
        "sample_size": 10, "in_channels": 3, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 3,
        "joint_attention_dim": 13, "pooled_projection_dim": 11, "out_channels": 5, "pos_embed_max_size": 7,
    }  # fmt: skip
    sizes |= others
    width = sizes["attention_head_dim"] * sizes["num_attention_heads"]
    return MMDiTConfig(caption_projection_dim=width, **sizes)


SD35 = small(qk_norm="rms_norm", dual_attention_layers=(0,))


def drawn(seed: int) -> tuple[MMDiTConfig, dict[str, int]]:
    """Return a configuration, and sizes of a call."""
    draw = python_random.Random(seed)
    num_layers, patch_size, table = draw.choice([1, 2, 3]), draw.choice([1, 2, 3]), draw.choice([4, 5, 6, 7])
    config = small(
        num_layers=num_layers,
        patch_size=patch_size,
        pos_embed_max_size=table,
        attention_head_dim=draw.choice([4, 8, 12]),
        num_attention_heads=draw.choice([1, 2, 3]),
        dual_attention_layers=tuple(layer for layer in range(num_layers) if draw.random() < 0.5),
        qk_norm=draw.choice([None, "rms_norm"]),
    )
    rows, columns = draw.sample(range(1, table + 1), 2)
    return config, {"batch_size": draw.choice([1, 3]), "text": draw.choice([1, 5]), "rows": rows, "columns": columns}


def random_inputs(
    config: MMDiTConfig, dtype=torch.float64, *, batch_size=3, text=5, rows=2, columns=3, last_time=999.0
) -> list[torch.Tensor]:
    height, width = rows * config.patch_size, columns * config.patch_size
    return [
        random(batch_size, config.in_channels, height, width, seed=50, dtype=dtype),
        random(batch_size, text, config.joint_attention_dim, seed=51, dtype=dtype),
        random(batch_size, config.pooled_projection_dim, seed=52, dtype=dtype),
        torch.linspace(last_time, 0, batch_size, dtype=torch.promote_types(dtype, torch.float32)),
    ]


def random_state(config: MMDiTConfig, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Matrices scaled by fan-in; norms' weights around 1."""
    state = {}
    for seed, (name, shape) in enumerate(mmdit.state_shapes(config).items()):
        scale = 0.5 if len(shape) == 1 or name == mmdit.POSITIONS else math.prod(shape[1:]) ** -0.5
        state[name] = (random(*shape, seed=seed) * scale + ("norm_" in name and "norm_out" not in name)).to(dtype)
    return state


def model_of_diffusers(config: MMDiTConfig, state: dict[str, torch.Tensor]) -> SD3Transformer2DModel:
    options = {name: getattr(config, name) for name in MMDiTConfig.__dataclass_fields__}
    with torch.device("meta"):
        model = SD3Transformer2DModel(**options)
    model.load_state_dict(state, assign=True)
    return model.eval()


def of_leaves(module, names, config, timesteps):
    """Return a function of latents, text, pooled text and parameters."""
    return lambda latents, text, pooled, *leaves: module.mmdit(
        dict(zip(names, leaves, strict=True)), latents, text, pooled, timesteps, config=config
    )


def to_jax(tensors):
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), tensors)


@pytest.mark.parametrize("seed", range(12))
def test_mmdit_is_that_of_diffusers(seed):
    config, sizes = drawn(seed)
    state, inputs = random_state(config), random_inputs(config, **sizes)
    *arrays, timesteps = inputs
    cotangent = random(arrays[0].shape[0], config.out_channels, *arrays[0].shape[2:], seed=53)
    model = model_of_diffusers(config, state)
    parameters = dict(model.named_parameters())
    with float32_as_float64():
        leaves = [array.clone().requires_grad_() for array in arrays]
        expected = model(*leaves, timesteps).sample
        gradients = torch.autograd.grad(expected, [*leaves, *parameters.values()], cotangent, materialize_grads=True)

    names = [*parameters, mmdit.POSITIONS]
    function = of_leaves(mmdit, names, config, timesteps)
    actual, *actual_gradients = value_and_grads(function, [*arrays, *(state[name] for name in names)], cotangent)
    assert_equal_to_rounding(actual, expected.detach())
    for name, one_actual, one_expected in zip(["", "", "", *parameters], actual_gradients, gradients, strict=False):
        if is_without_effect(name, config):
            assert max(one_actual.abs().max(), one_expected.abs().max()) < 1e-12, name
        else:
            largest = one_expected.abs().max()
            assert largest > 1e-4, name
            assert (one_actual - one_expected).abs().max() <= RELATIVE * largest, name


def is_without_effect(name: str, config: MMDiTConfig) -> bool:
    """Say whether the result does not depend on a parameter: the last block's queries of the text, and what shifts all keys."""
    last = f"transformer_blocks.{config.num_layers - 1}.attn"
    return name.startswith((f"{last}.add_q_proj", f"{last}.norm_added_q")) or (
        config.qk_norm is None and name.endswith("attn2.to_k.bias")
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_as_many_parameters_as_the_published_models(name):
    config = MMDIT_PRESETS[name]
    shapes = mmdit.state_shapes(config)
    assert states.num_parameters(shapes) - math.prod(shapes[mmdit.POSITIONS]) == PUBLISHED[name]
    with torch.device("meta"):
        model = SD3Transformer2DModel(**{name: getattr(config, name) for name in MMDiTConfig.__dataclass_fields__})
    assert model.num_parameters() == PUBLISHED[name]
    assert {name: tuple(entry.shape) for name, entry in model.state_dict().items()} == shapes
    assert jax_mmdit.state_shapes(config) == shapes


def test_a_config_of_diffusers_is_taken_as_it_stands():
    with torch.device("meta"):
        model = SD3Transformer2DModel(num_layers=2, dual_attention_layers=[1], qk_norm="rms_norm")
    config = MMDiTConfig(**{name: entry for name, entry in model.config.items() if not name.startswith("_")})
    assert hash(config) == hash(MMDiTConfig(num_layers=2, dual_attention_layers=(1,), qk_norm="rms_norm"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        (
            {"caption_projection_dim": 25},
            "caption_projection_dim must be num_attention_heads * attention_head_dim = 1152, got 25",
        ),
        ({"dual_attention_layers": (17, 18)}, "dual_attention_layers must be in 0..17, got (17, 18)"),
        ({"qk_norm": "layer_norm"}, "qk_norm must be None or 'rms_norm', got 'layer_norm'"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MMDiTConfig(**options)


def test_a_checkpoint_of_diffusers_is_taken_as_it_stands(tmp_path):
    model = SD3Transformer2DModel(**{name: getattr(SD35, name) for name in MMDiTConfig.__dataclass_fields__})
    table = model.state_dict()[mmdit.POSITIONS].clone()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = random(*parameter.shape, seed=seed).float() * parameter[0].numel() ** -0.5
    model.save_pretrained(tmp_path)
    checkpoint = safetensors.torch.load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert torch.equal(checkpoint[mmdit.POSITIONS], table)
    inputs = random_inputs(SD35, torch.float32, last_time=2)
    with torch.no_grad():
        expected = model(*inputs).sample
    assert_equal_to_rounding(mmdit.mmdit(checkpoint, *inputs, config=SD35), expected)
    assert_equal_to_rounding(jax_mmdit.mmdit(to_jax(checkpoint), *to_jax(inputs), config=SD35), expected)


@pytest.mark.parametrize("module", [mmdit, jax_mmdit])
def test_latents_get_the_middle_of_the_table(module):
    config, table = small(attention_head_dim=4, num_attention_heads=1), torch.arange(7 * 7 * 4.0).reshape(1, 49, 4)
    table = to_jax(table) if module is jax_mmdit else table
    rows, columns = [2, 3], [1, 2, 3, 4]  # of 7, one less before than after
    expected = [[4 * (7 * row + column) + feature for feature in range(4)] for row in rows for column in columns]
    assert module.middle_of_positions(table, 2, 4, config=config).tolist() == expected


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("config", [SD35, small(num_layers=1)])
def test_jax_mmdit_is_that_of_torch(config, x64):
    dtype = torch.float64 if x64 else torch.float32
    state, (*arrays, timesteps) = random_state(config, dtype), random_inputs(config, dtype, last_time=2)
    arrays += state.values()
    cotangent = random(3, config.out_channels, 4, 6, seed=53, dtype=dtype)
    expected = value_and_grads(of_leaves(mmdit, state, config, timesteps), arrays, cotangent)
    with jax.enable_x64(x64):
        function = jax.jit(of_leaves(jax_mmdit, state, config, to_jax(timesteps)))
        assert_all_equal_to_rounding(jax_value_and_grads(function, arrays, cotangent), expected)


@pytest.mark.parametrize("module", [mmdit, jax_mmdit])
def test_half_precision_is_rounded_once(module):
    state, inputs = random_state(SD35, torch.bfloat16), random_inputs(SD35, torch.float32)
    narrow = [*(each.bfloat16() for each in inputs[:3]), inputs[3]]
    wide = {name: each.float() for name, each in state.items()}, *(each.float() for each in narrow)
    if module is jax_mmdit:
        wide = to_jax(wide)
        narrow = [*(each.astype(jnp.bfloat16) for each in wide[1:4]), wide[4]]
        state = {name: each.astype(jnp.bfloat16) for name, each in wide[0].items()}
    out, expected = module.mmdit(state, *narrow, config=SD35), module.mmdit(*wide, config=SD35)
    assert "bfloat16" in str(out.dtype) and "float32" in str(expected.dtype)
    assert bool((out == (expected.astype(jnp.bfloat16) if module is jax_mmdit else expected.bfloat16())).all())


@pytest.mark.parametrize("module", [mmdit, jax_mmdit])
def test_a_block_computes_in_float32_and_rounds_once(module):
    state = {name: random(*shape, seed=6) * shape[-1] ** -0.5 for name, shape in mmdit.block_shapes(SD35, 0).items()}
    tokens = [random(*each.shape, seed=seed) for seed, each in enumerate(TOKENS.values())]
    wide = jax.tree.map(lambda each: each.bfloat16().float(), [state, *tokens])
    arrays = to_jax(wide) if module is jax_mmdit else wide
    narrow = jax.tree.map(lambda each: each.astype(jnp.bfloat16) if module is jax_mmdit else each.bfloat16(), arrays)
    for actual, expected in zip(
        module.block(*narrow, config=SD35, index=0), module.block(*arrays, config=SD35, index=0), strict=True
    ):
        assert "bfloat16" in str(actual.dtype)
        assert bool((actual == (expected.astype(jnp.bfloat16) if module is jax_mmdit else expected.bfloat16())).all())


@pytest.mark.parametrize("module", [mmdit, jax_mmdit])
@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"text": 0}])
def test_an_empty_batch_and_an_empty_text_are_ordinary(module, sizes):
    arguments = random_state(SD35, torch.float32), *random_inputs(SD35, torch.float32, **sizes)
    out = module.mmdit(*(to_jax(arguments) if module is jax_mmdit else arguments), config=SD35)
    assert out.shape == (sizes.get("batch_size", 3), 5, 4, 6)
    assert not np.isnan(np.asarray(out)).any()


BLOCK = {name: torch.zeros(shape) for name, shape in mmdit.block_shapes(SD35, 0).items()}
TOKENS = {"hidden_states": torch.ones(2, 6, 24), "encoder_hidden_states": torch.ones(2, 5, 24), "conditioning": torch.ones(2, 24)}


@pytest.mark.parametrize("module", [mmdit, jax_mmdit])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("state", {name: entry for name, entry in BLOCK.items() if not name.startswith("attn2")}),
        ("hidden_states", torch.ones(2, 6, 23)),
        ("encoder_hidden_states", torch.ones(3, 5, 24)),
        ("conditioning", torch.ones(2, 1, 24)),
        ("conditioning", torch.ones(2, 24, dtype=torch.float16)),
        ("index", 2),
    ],
)
def test_bad_calls_of_a_block_name_the_argument(module, argument, value):
    arguments = {"state": BLOCK, **TOKENS, "index": 0} | {argument: value}
    if module is jax_mmdit:
        arguments = {name: each if name == "index" else to_jax(each) for name, each in arguments.items()}
    with pytest.raises((TypeError, ValueError), match=rf"^{argument} must "):
        module.block(**arguments, config=SD35)


@pytest.mark.parametrize("module", [layers, jax_layers])
def test_patches_of_an_image_that_is_no_square_are_put_together(module):
    images = random(2, 3, 4, 6, seed=5)
    patches = torch.nn.functional.unfold(images, 2, stride=2).mT.unflatten(2, (3, 4)).mT.flatten(2)  # channel last
    array = to_jax(patches.float()) if module is jax_layers else patches.float()
    np.testing.assert_array_equal(module.unpatchify(array, patch_size=2, num_rows=2), images.float())
    with pytest.raises(ValueError, match=r"^patches must be a multiple of num_rows=4 patches, got \(2, 6, 12\)"):
        module.unpatchify(array, patch_size=2, num_rows=4)
    with pytest.raises(ValueError, match=r"^num_rows must be in "):
        module.unpatchify(array, patch_size=2, num_rows=0)


def checkpoint_of_stability(config: MMDiTConfig, prefix: str) -> dict[str, torch.Tensor]:
    """Return random entries by the names of Stability AI's code."""
    width, patch = config.hidden_size, config.patch_size
    linears = {
        "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, config.pooled_projection_dim), "y_embedder.mlp.2": (width, width),
        "context_embedder": (width, config.joint_attention_dim),
        "x_embedder.proj": (width, config.in_channels, patch, patch),
        "final_layer.adaLN_modulation.1": (2 * width, width), "final_layer.linear": (patch**2 * config.out_channels, width),
    }  # fmt: skip
    norms = []
    for index in range(config.num_layers):
        for stream in ("x", "context"):
            is_whole = stream == "x" or index < config.num_layers - 1
            is_dual = stream == "x" and index in config.dual_attention_layers
            name = f"joint_blocks.{index}.{stream}_block"
            linears[f"{name}.adaLN_modulation.1"] = ((9 if is_dual else 6 if is_whole else 2) * width, width)
            for attention in ("attn", "attn2") if is_dual else ("attn",):
                linears[f"{name}.{attention}.qkv"] = (3 * width, width)
                linears |= {f"{name}.{attention}.proj": (width, width)} if is_whole else {}
                norms += [f"{name}.{attention}.ln_q", f"{name}.{attention}.ln_k"] if config.qk_norm else []
            if is_whole:
                linears |= {f"{name}.mlp.fc1": (4 * width, width), f"{name}.mlp.fc2": (width, 4 * width)}
    shapes = {"pos_embed": (1, config.pos_embed_max_size**2, width)}
    shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes |= {f"{name}.weight": (config.attention_head_dim,) for name in norms}
    return {f"{prefix}{name}": random(*shape, seed=seed).float() for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
@pytest.mark.parametrize("config", [SD35, small(num_layers=3)])
def test_a_checkpoint_of_stability_becomes_one_of_diffusers(tmp_path, config, prefix):
    other = {"first_stage_model.encoder.conv_in.bias": torch.zeros(3)} if prefix else {}
    safetensors.torch.save_file(checkpoint_of_stability(config, prefix) | other, tmp_path / "sd3.safetensors")
    checkpoint = safetensors.torch.load_file(tmp_path / "sd3.safetensors")
    transformer = {name: entry for name, entry in checkpoint.items() if name not in other}
    expected = convert_sd3_transformer_checkpoint_to_diffusers(transformer)
    for module in (mmdit, jax_mmdit):
        loaded = module.load_state(to_jax(checkpoint) if module is jax_mmdit else checkpoint, config=config)
        assert list(loaded) == list(mmdit.state_shapes(config)) and loaded.keys() == expected.keys()
        for name, entry in expected.items():
            np.testing.assert_array_equal(loaded[name], entry)
        again = module.load_state(loaded, config=config)
        assert list(again) == list(loaded) and all(again[name] is loaded[name] for name in loaded)


@pytest.mark.parametrize("module", [mmdit, jax_mmdit])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state | {"joint_blocks.2.x_block.attn.qkv.bias": torch.zeros(72)}, "joint_blocks.2.x_block.attn.qkv.bias"),
        (lambda state: {k: v for k, v in state.items() if "final_layer.linear.bias" not in k}, "final_layer.linear.bias"),
        (lambda state: state | {"joint_blocks.0.x_block.attn.qkv.bias": torch.zeros(24)}, "of shape (72,), got (24,)"),
        (lambda _: random_state(SD35, torch.float32) | {"proj_out.bias": torch.zeros(3)}, "of shape (20,), got (3,)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(module, spoil, message):
    bad = spoil(checkpoint_of_stability(SD35, ""))
    with pytest.raises(ValueError, match=f"^state must .*{re.escape(message)}"):
        module.load_state(to_jax(bad) if module is jax_mmdit else bad, config=SD35)


@pytest.mark.parametrize("config", [SD35, small(num_layers=1)])
def test_the_model_of_library_operations_is_the_reference(config):
    state, (*arrays, timesteps) = random_state(config), random_inputs(config)
    arrays += state.values()
    cotangent = random(3, config.out_channels, 4, 6, seed=53)
    expected = value_and_grads(of_leaves(mmdit, state, config, timesteps), arrays, cotangent)
    actual = value_and_grads(of_leaves(SimpleNamespace(mmdit=mmdit_by_library), state, config, timesteps), arrays, cotangent)
    for one_actual, one_expected in zip(actual, expected, strict=True):
        assert (one_actual - one_expected).abs().max() <= max(RELATIVE * one_expected.abs().max(), 1e-12)
