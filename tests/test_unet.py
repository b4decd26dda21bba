"""The UNets against diffusers', against their twins, and by themselves."""

import functools
import os
import re
from dataclasses import replace

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import jax
import jax.numpy as jnp
import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from test_references import float32_as_float64, jax_value_and_grads, random, value_and_grads

from gaugeblock.conformance.engine.budget.oracle import exact_inputs, reference_run
from gaugeblock.conformance.engine.inputs.cases import Case, cotangents, options
from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.conformance.peers.diffusers_unet import made
from gaugeblock.optimized.compiled.unet import unet_by_library
from gaugeblock.optimized.triton.unet import unet as triton_unet
from gaugeblock.reference import states
from gaugeblock.reference.configs import UNET_PRESETS, UNetConfig
from gaugeblock.reference.jax import unet as jax_unet
from gaugeblock.reference.torch import unet
from gaugeblock.reference.unet_states import state_shapes

SMALL = UNetConfig(
    in_channels=3, out_channels=5, block_out_channels=(8, 12), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    layers_per_block=1, transformer_layers_per_block=(1, 1), attention_head_dim=(2, 3), cross_attention_dim=7,
    norm_num_groups=4, norm_eps=1e-2,
)  # fmt: skip
WITH_SIZES = replace(SMALL, addition_time_embed_dim=6, projection_class_embeddings_input_dim=11 + 2 * 6)
DEEP = UNetConfig(
    in_channels=2, out_channels=3, block_out_channels=(12, 6, 18), cross_attention_dim=5, norm_num_groups=3,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=2,
    transformer_layers_per_block=(1, 2, 1), attention_head_dim=(4, 1, 2), use_linear_projection=True,
)  # fmt: skip
# height, width, text_length, batch_size
SIZES = {"even": (6, 8, 5, 1), "odd": (9, 7, 3, 3), "a pixel": (1, 1, 4, 1)}
MASKS = {"no mask": None, "masked": [[True, False, True], [False, False, True], [True, True, True]]}


def random_inputs(config: UNetConfig, size: str, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Latents, times, text, and what SDXL has beside."""
    height, width, text_length, batch_size = SIZES[size]
    inputs = [
        random(batch_size, config.in_channels, height, width, seed=50, dtype=dtype),
        torch.tensor([2, 0, 1.25], dtype=dtype)[:batch_size],  # angles of 999 have 999 units of rounding
        random(batch_size, text_length, config.cross_attention_dim, seed=51, dtype=dtype),
    ]
    if config.addition_time_embed_dim:
        inputs += [random(batch_size, 11, seed=52, dtype=dtype), torch.tensor([[3, 0], [1, 2], [0, 5]], dtype=dtype)[:batch_size]]
    return inputs


def random_state(config: UNetConfig, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {
        name: (random(*shape, seed=seed) * max(1, torch.Size(shape[1:]).numel()) ** -0.5).to(dtype)
        for seed, (name, shape) in enumerate(state_shapes(config).items())
    }


def function_of(module, config: UNetConfig, state: dict, inputs: list, mask):
    """Return the UNet as a function of latents, text, the pooled text if there is one, and all parameters; and these."""
    operation = functools.partial(module.unet_text_time if config.addition_time_embed_dim else module.unet, config=config)
    differentiable = [place for place in (0, 2, 3) if place < len(inputs)]

    def function(*leaves):
        arrays = [*inputs]
        for place, leaf in zip(differentiable, leaves, strict=False):
            arrays[place] = leaf
        return operation(dict(zip(state, leaves[len(differentiable) :], strict=True)), *arrays, mask)

    return function, [*(inputs[place] for place in differentiable), *state.values()]


def assert_close(actual: list, expected: list) -> None:
    """Differ by no more than what the sums of a whole model lose, of each array's largest element or of 1."""
    for one_actual, one_expected in zip(actual, expected, strict=True):
        assert one_actual.shape == one_expected.shape
        tensor = torch.tensor(jax.device_get(one_actual)) if isinstance(one_actual, jax.Array) else one_actual
        difference = tensor - one_expected
        assert difference.abs().max() <= RELATIVE * max(1, one_expected.abs().max())


def by_diffusers(config: UNetConfig, state: dict, inputs: list, mask):
    """Return their UNet as the same function."""

    def operation(parameters, latents, timesteps, text, *added):
        kwargs = {"added_cond_kwargs": dict(zip(("text_embeds", "time_ids"), added[:-1], strict=True))} if added[:-1] else {}
        arguments, kwargs = (latents, timesteps, text), kwargs | {"encoder_attention_mask": added[-1]}
        return torch.func.functional_call(made(config), parameters, arguments, kwargs).sample

    class Theirs:
        unet = unet_text_time = staticmethod(lambda *arguments, config: operation(*arguments))

    return function_of(Theirs, config, state, inputs, mask)[0]


RELATIVE = 1e-12  # float64 keeps 1e-16; some hundred additions one after the other lose two digits of it, cancellation one more
CASES = [
    (SMALL, "even", "no mask"),
    (SMALL, "odd", "masked"),
    (WITH_SIZES, "odd", "masked"),
    (DEEP, "odd", "no mask"),
    (DEEP, "a pixel", "no mask"),
]


@pytest.mark.parametrize(("config", "size", "masked"), CASES)
def test_unet_is_that_of_diffusers_and_the_twin_too(config, size, masked):
    state, inputs, mask = random_state(config), random_inputs(config, size), MASKS[masked] and torch.tensor(MASKS[masked])
    function, arrays = function_of(unet, config, state, inputs, mask)
    cotangent = random(inputs[0].shape[0], config.out_channels, *inputs[0].shape[2:], seed=53)
    actual = value_and_grads(function, arrays, cotangent)
    if size != "a pixel":  # which looks at itself alone, whatever it asks
        assert min(each.abs().max() for each in actual) > 1e-4
    with float32_as_float64():
        assert_close(actual, value_and_grads(by_diffusers(config, state, inputs, mask), arrays, cotangent))
    if config is WITH_SIZES:  # XLA compiles for long
        with jax.enable_x64(True):
            jax_inputs = [jnp.asarray(each.numpy()) for each in inputs]
            twin, _ = function_of(jax_unet, config, state, jax_inputs, jnp.asarray(mask.numpy()))
            assert_close(jax_value_and_grads(jax.jit(twin), arrays, cotangent), actual)


@pytest.mark.parametrize("operation", [unet.unet, unet_by_library, triton_unet])
def test_no_mask_is_one_that_hides_nothing(operation):
    inputs, state = random_inputs(SMALL, "odd", torch.float32), random_state(SMALL, torch.float32)
    masked = operation(state, *inputs, torch.ones(3, 3, dtype=torch.bool), config=SMALL)
    torch.testing.assert_close(operation(state, *inputs, config=SMALL), masked)


def test_an_example_without_any_text_sees_nothing_where_diffusers_lets_it_see_all():
    state, inputs = random_state(SMALL), random_inputs(SMALL, "odd")
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    out = unet.unet(state, *inputs, mask, config=SMALL)
    other_text = torch.where(mask[..., None], inputs[2], random(*inputs[2].shape, seed=9))
    assert torch.equal(out, unet.unet(state, *inputs[:2], other_text, mask, config=SMALL))
    without_text = [*inputs[:2], inputs[2][:, :0]]
    assert_close([unet.unet(state, *without_text, config=SMALL)[1]], [out[1]])

    function, arrays = function_of(unet, SMALL, state, inputs, mask)
    theirs = by_diffusers(SMALL, state, inputs, mask)(*arrays)
    everything = unet.unet(state, *inputs, mask | ~mask.any(1, keepdim=True), config=SMALL)
    torch.testing.assert_close(theirs, everything, rtol=1e-5, atol=1e-5)  # diffusers' times are float32
    assert (theirs[1] - out[1]).abs().max() > 1e-2
    gradients = value_and_grads(function, arrays, torch.ones_like(out))
    assert all(bool(each.isfinite().all()) for each in gradients) and not gradients[2][1].any()


@pytest.mark.parametrize(
    ("name", "exactly"),
    [("SD-1.5", 859_520_964), ("SD-2.1", 865_910_724), ("SDXL-base", 2_567_463_684), ("SDXL-refiner", 2_259_526_660)],
)
def test_presets_have_the_parameters_of_the_published_checkpoints(name, exactly):
    shapes = state_shapes(UNET_PRESETS[name])
    model = made(UNET_PRESETS[name])
    assert states.num_parameters(shapes) == model.num_parameters() == exactly
    assert shapes == {key: tuple(entry.shape) for key, entry in model.state_dict().items()}


def test_a_file_of_diffusers_is_taken_as_it_is(tmp_path):
    model: UNet2DConditionModel = made.__wrapped__(WITH_SIZES).to_empty(device="cpu")
    model.load_state_dict(random_state(WITH_SIZES, torch.float32))
    model.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    inputs = random_inputs(WITH_SIZES, "even", torch.float32)
    out = unet.unet_text_time(state, *inputs, config=WITH_SIZES)
    with torch.no_grad():
        expected = model(*inputs[:3], added_cond_kwargs={"text_embeds": inputs[3], "time_ids": inputs[4]}).sample
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_is_rounded_once():
    state, (latents, times, text) = random_state(SMALL, torch.bfloat16), random_inputs(SMALL, "odd", torch.float32)
    latents, text = latents.bfloat16(), text.bfloat16()
    out = unet.unet(state, latents, times, text, config=SMALL)
    wide = {name: entry.float() for name, entry in state.items()}
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, unet.unet(wide, latents.float(), times, text.float(), config=SMALL).bfloat16())


def test_a_batch_may_be_empty():
    for config in (SMALL, WITH_SIZES):
        state, inputs = random_state(config, torch.float32), random_inputs(config, "odd", torch.float32)
        empty = [each[:0] for each in inputs]
        function, arrays = function_of(unet, config, state, empty, None)
        assert function(*arrays).shape == (0, 5, 9, 7)
        twin, _ = function_of(jax_unet, config, state, [jnp.asarray(each.numpy()) for each in empty], None)
        assert jax.eval_shape(twin, *(jnp.asarray(each.numpy()) for each in arrays)).shape == (0, 5, 9, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": ()}, "block_out_channels must have an entry for each level, got none"),
        ({"block_out_channels": (8, 10)}, "block_out_channels must be positive multiples of 4, got (8, 10)"),
        ({"block_out_channels": (6, 12), "norm_num_groups": 6, "attention_head_dim": (4, 3)}, "attention_head_dim must divide 6"),
        ({"block_out_channels": (9, 12), "norm_num_groups": 3, "attention_head_dim": (3, 3)}, "block_out_channels must begin"),
        ({"attention_head_dim": (2,)}, "attention_head_dim must have 2 entries"),
        ({"down_block_types": ("DownBlock2D", "UpBlock2D")}, "down_block_types must be CrossAttnDownBlock2D or DownBlock2D"),
        ({"layers_per_block": 0}, "layers_per_block must be positive, got 0"),
        ({"transformer_layers_per_block": (1, 0)}, "transformer_layers_per_block must be positive"),
        ({"addition_time_embed_dim": 7}, "addition_time_embed_dim must be even and at least 4"),
        ({"projection_class_embeddings_input_dim": 7}, "addition_time_embed_dim must be even and at least 4"),
        ({"addition_time_embed_dim": 8}, "projection_class_embeddings_input_dim must be at least 8"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        replace(SMALL, **change)


@pytest.mark.parametrize("module", [unet, jax_unet])
def test_a_bad_call_names_the_argument(module):
    def call(config, place=None, wrong=None, operation=None, mask=None):
        arrays = random_inputs(config, "odd", torch.float32)[: 3 if operation == "unet" else None]
        if place is not None:
            arrays[place] = wrong(arrays[place])
        state, as_given = random_state(config, torch.float32), lambda each: each
        convert = as_given if module is unet else lambda each: jnp.asarray(each.numpy())
        name = operation or ("unet_text_time" if config.addition_time_embed_dim else "unet")
        parameters = {key: convert(each) for key, each in state.items()}
        getattr(module, name)(parameters, *map(convert, arrays), mask and convert(mask[0]), config=config)

    for config, place, wrong, message in (
        (SMALL, 0, lambda each: each[:, :2], r"latents must be \[batch_size, in_channels=3, height, width\], got \(3, 2, 9, 7\)"),
        (SMALL, 0, lambda each: each[..., :0], r"latents must have a height and a width of at least 1, got \(3, 3, 9, 0\)"),
        (SMALL, 1, lambda each: each.half(), "timesteps must be float32 or float64, got float16"),
        (SMALL, 2, lambda each: each[:, :, 1:], "encoder_hidden_states must be .*cross_attention_dim=7"),
        (WITH_SIZES, 3, lambda each: each[:, 1:], r"text_embeds and time_ids must .*text_embed_dim \+ 6 \* num_time_ids = 23"),
        (WITH_SIZES, 4, lambda each: each[:, 1:], "text_embeds and time_ids must .*, got 11 and 1"),
        (WITH_SIZES, 4, lambda each: each.half(), "time_ids must be float32 or float64, got float16"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            call(config, place, wrong)
    for mask, message in ((torch.ones(3, 3), "bool, got float32"), (torch.ones(3, 2) > 0, r"\[batch_size=3, text_length=3\]")):
        with pytest.raises((TypeError, ValueError), match=f"^encoder_attention_mask must be {message}"):
            call(SMALL, mask=[mask])
    with pytest.raises(ValueError, match=r"^config must be a model without added embeddings"):
        call(replace(SMALL, addition_time_embed_dim=6, projection_class_embeddings_input_dim=23), 0, lambda each: each, "unet")
    with pytest.raises(ValueError, match=r"^config must be a model with added embeddings, got one for unet"):
        arrays = random_inputs(WITH_SIZES, "odd", torch.float32)
        unet.unet_text_time(random_state(SMALL, torch.float32), *arrays, config=SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", [SMALL, WITH_SIZES], ids=["unet", "unet_text_time"])
def test_times_and_sizes_are_read_in_the_dtype_of_the_state(config, dtype):
    """Whichever of the two dtypes that are taken they come in."""
    state, inputs = random_state(config, dtype), random_inputs(config, "a pixel", dtype)
    operation = unet.unet_text_time if config.addition_time_embed_dim else unet.unet
    expected = operation(state, *inputs, config=config)
    for place in (1, 4)[: len(inputs) // 2]:
        for other in (torch.float32, torch.float64):
            given = [each.to(other) if number == place else each for number, each in enumerate(inputs)]
            assert torch.equal(operation(state, *given, config=config), expected)


@pytest.mark.parametrize("name", ["unet.unet", "unet.unet_text_time"])
def test_with_flash_attention_it_is_the_same_function_with_the_same_gradients(name):
    contract = find_contract(name)
    case = Case(**contract.landmarks[0], regime="dithered", traits=("nothing by the first",))
    arguments = exact_inputs(contract, case, "float32"), options(contract, case), cotangents(contract, case)
    expected = reference_run(contract, *arguments)
    for key, tensor in reference_run(contract, *arguments, contract.rounded_as).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-10, atol=1e-10 * float(expected[key].abs().max()) + 1e-13)
