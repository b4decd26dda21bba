"""SDAR, SDAR-MoE, LLaDA and Dream: masks by hand, the cache, packing, checkpoints and published sizes.

The models themselves are compared with transformers' in `test_oracles.py`.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # transformers imports triton, which then decorates

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from agreement import assert_agree
from test_references import random

from gaugeblock.conformance.peers.transformers_decoders import their_config
from gaugeblock.reference import decoder_states, states
from gaugeblock.reference.configs import (
    DREAM_PRESETS,
    LLADA_PRESETS,
    SDAR_MOE_PRESETS,
    SDAR_PRESETS,
    DreamConfig,
    LLaDAConfig,
    SDARConfig,
    SDARMoEConfig,
)
from gaugeblock.reference.jax import block_masks as jax_block_masks
from gaugeblock.reference.jax import dream as jax_dream
from gaugeblock.reference.jax import llada as jax_llada
from gaugeblock.reference.jax import sdar as jax_sdar
from gaugeblock.reference.torch import block_masks, dream, llada, sdar

# sizes that differ pairwise, so that none can stand for another
SMALL = {
    "vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "rms_norm_eps": 1e-3, "rope_theta": 100.0, "mask_token_id": 39,
}  # fmt: skip
DENSE = SDARConfig(**SMALL, intermediate_size=10, block_length=3)
SPARSE = SDARMoEConfig(**SMALL, moe_intermediate_size=7, block_length=3, num_experts=5, num_experts_per_tok=2)
LLADA, DREAM = (each(**SMALL, intermediate_size=10) for each in (LLaDAConfig, DreamConfig))
EACH_SDAR = pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "moe"])
IDS = torch.tensor([[3, 38, 39, 7, 0, 39, 21, 5, 39, 1, 2], [39, 39, 4, 4, 9, 12, 31, 39, 17, 8, 6]])
SAMPLES = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1], [7] * 11])


@functools.cache
def parameters(config) -> dict[str, torch.Tensor]:
    """Random parameters in float64, none of them 0 or 1."""
    shapes = (llada if config is LLADA else dream if config is DREAM else sdar).state_shapes(config)
    return {
        name: random(*shape, seed=seed) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.5)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def to_jax(tensors):
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), tensors)


def predict(config, ids):
    """The logits of `sdar` or `sdar_moe`."""
    out = (sdar.sdar if config is DENSE else sdar.sdar_moe)(parameters(config), ids, config=config)
    return out if config is DENSE else out[0]


def no_past(config, batch_size):
    shape = config.num_hidden_layers, batch_size, config.num_key_value_heads, 0, config.head_dim
    return torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)


def rows(mask) -> list[str]:
    return ["".join(".x"[int(each)] for each in row) for row in np.asarray(mask)]


@pytest.mark.parametrize(("block_length", "expected"), [
    (1, ["x.......", "xx......", "xxx.....", "xxxx....", "xxxxx...", "xxxxxx..", "xxxxxxx.", "xxxxxxxx"]),
    (2, ["xx......", "xx......", "xxxx....", "xxxx....", "xxxxxx..", "xxxxxx..", "xxxxxxxx", "xxxxxxxx"]),
    (8, ["xxxxxxxx"] * 8),
])  # fmt: skip
@pytest.mark.parametrize(("module", "arange"), [(block_masks, torch.arange), (jax_block_masks, jnp.arange)], ids=["torch", "jax"])
def test_block_causal_mask_by_hand(module, arange, block_length, expected):
    places = arange(8)
    assert rows(module.block_causal_mask(places, places, block_length=block_length)) == expected
    cached = module.block_causal_mask(places[4:], places, block_length=block_length)
    assert rows(cached) == expected[4:]
    of_two = module.block_causal_mask(places.reshape(2, 4), places.reshape(2, 4), block_length=block_length)
    assert [rows(each) for each in of_two] == [
        [row[start : start + 4] for row in expected[start : start + 4]] for start in (0, 4)
    ]


@pytest.mark.parametrize(("block_length", "noisy", "clean"), [
    (1, ["x.......", ".x......", "..x.....", "...x....", "....x...", ".....x..", "......x.", ".......x"],
        ["........", "x.......", "xx......", "xxx.....", "xxxx....", "xxxxx...", "xxxxxx..", "xxxxxxx."]),
    (2, ["xx......", "xx......", "..xx....", "..xx....", "....xx..", "....xx..", "......xx", "......xx"],
        ["........", "........", "xx......", "xx......", "xxxx....", "xxxx....", "xxxxxx..", "xxxxxx.."]),
    (8, ["xxxxxxxx"] * 8, ["........"] * 8),
])  # fmt: skip
@pytest.mark.parametrize("module", [block_masks, jax_block_masks], ids=["torch", "jax"])
def test_noisy_clean_mask_by_hand(module, block_length, noisy, clean):
    one_sample = jnp.zeros((1, 8), int) if module is jax_block_masks else torch.zeros(1, 8, dtype=torch.int64)
    (mask,) = module.noisy_clean_mask(one_sample, block_length=block_length)
    places = np.arange(8)
    of_clean = rows(block_masks.block_causal_mask(*[torch.from_numpy(places)] * 2, block_length=block_length))
    assert rows(mask[:8, :8]) == noisy and rows(mask[:8, 8:]) == clean
    assert rows(mask[8:, :8]) == ["........"] * 8 and rows(mask[8:, 8:]) == of_clean


@pytest.mark.parametrize("module", [block_masks, jax_block_masks], ids=["torch", "jax"])
def test_blocks_and_places_restart_with_each_sample(module):
    samples = SAMPLES[:1] if module is block_masks else to_jax(SAMPLES[:1])
    assert module.places_in_samples(samples).tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]]
    (mask,) = module.noisy_clean_mask(samples, block_length=3)
    assert rows(mask[:11, :11]) == [
        "xxx........", "xxx........", "xxx........", "...xx......", "...xx......",
        ".....xxx...", ".....xxx...", ".....xxx...", "........x..", "...........", "...........",
    ]  # fmt: skip
    assert rows(mask[8:9, 11:]) == [".....xxx..."] and not np.asarray(mask)[[9, 10, 20, 21]].any()
    assert not np.asarray(mask)[:, [9, 10, 20, 21]].any()


@EACH_SDAR
def test_cached_blocks_give_what_the_whole_gives(config):
    past, found = no_past(config, len(IDS)), []
    for first, last in ((0, 6), (6, 9), (9, 11)):  # a prompt of two blocks, a block, and a part of one
        logits, *own = sdar.sdar_cached(parameters(config), IDS[:, first:last], *past, config=config)
        past = tuple(torch.cat(each, dim=3) for each in zip(past, own, strict=True))
        found.append(logits)
    assert_agree({"logits": torch.cat(found, dim=1)}, {"logits": predict(config, IDS)})


@EACH_SDAR
def test_training_gives_what_decoding_gives(config):
    noisy = torch.where(random(*IDS.shape, seed=5) > 0, IDS, 39)
    samples = torch.zeros_like(IDS)
    actual = sdar.sdar_training(parameters(config), noisy, IDS, samples, config=config)
    for first in range(0, 11, config.block_length):
        seen = torch.cat([IDS[:, :first], noisy[:, first : first + config.block_length]], dim=1)
        block = slice(first, first + config.block_length)
        assert_agree({"block": actual[:, block]}, {"block": predict(config, seen)[:, block]}, first)


@EACH_SDAR
def test_packed_samples_are_as_alone(config):
    noisy = torch.where(random(*IDS.shape, seed=6) > 0, IDS, 39)
    packed = sdar.sdar_training(parameters(config), noisy, IDS, SAMPLES, config=config)
    for row, part in ((0, slice(0, 5)), (0, slice(5, 9)), (1, slice(0, 11))):
        ids = noisy[row : row + 1, part], IDS[row : row + 1, part]
        alone = sdar.sdar_training(parameters(config), *ids, torch.zeros_like(ids[0]), config=config)
        assert_agree({"sample": packed[row : row + 1, part]}, {"sample": alone}, (row, part))


@pytest.mark.parametrize(("operation", "config"), [(llada.llada, LLADA), (dream.dream, DREAM)], ids=["llada", "dream"])
def test_padding_does_not_matter(operation, config):
    alone = operation(parameters(config), IDS[:1], config=config)
    mask = torch.tensor([[True] * 11 + [False] * 2])
    right = operation(parameters(config), torch.nn.functional.pad(IDS[:1], (0, 2), value=9), mask, config=config)
    assert_agree({"logits": right[:, :11]}, {"logits": alone})
    if config is DREAM:  # whose places leave padding out: on the left as well, but for the first, which padding predicts
        left = operation(parameters(config), torch.nn.functional.pad(IDS[:1], (2, 0), value=9), mask.flip(1), config=config)
        assert_agree({"logits": left[:, 3:]}, {"logits": alone[:, 1:]})


def test_dream_predicts_each_token_by_the_one_before():
    assert dream.shift(torch.arange(3.0)[None, :, None]).flatten().tolist() == [0, 0, 1]
    assert jax_dream.shift(jnp.arange(3.0)[None, :, None]).flatten().tolist() == [0, 0, 1]
    assert dream.shift(torch.zeros(2, 1, 3)).shape == (2, 1, 3)


@EACH_SDAR
def test_a_block_sees_nothing_of_later_ones(config):
    changed = IDS.clone()
    changed[:, 6:] = 11
    before = predict(config, IDS)
    differs = (predict(config, changed) - before).abs().amax(dim=-1) > 1e-12  # experts with other rows round otherwise
    assert not differs[:, :6].any() and differs[:, 6:].all()
    changed[:, 5] = 13  # the last of the second block is seen by all of it
    differs = (predict(config, changed) - before).abs().amax(dim=-1) > 1e-12
    assert not differs[:, :3].any() and differs[:, 3:].all()


CALLS = {
    "llada": (llada.llada, jax_llada.llada, LLADA, (IDS, random(*IDS.shape, seed=1) < 1)),
    "dream": (dream.dream, jax_dream.dream, DREAM, (IDS, random(*IDS.shape, seed=1) < 1)),
    "sdar": (sdar.sdar, jax_sdar.sdar, DENSE, (IDS,)),
    "moe": (sdar.sdar_moe, jax_sdar.sdar_moe, SPARSE, (IDS,)),
    "cached": (
        sdar.sdar_cached,
        jax_sdar.sdar_cached,
        SPARSE,
        (IDS, random(2, 2, 2, 6, 6, seed=2), random(2, 2, 2, 6, 6, seed=3)),
    ),
    "training": (sdar.sdar_training, jax_sdar.sdar_training, SPARSE, (IDS.flip(1), IDS, SAMPLES)),
}
EACH_CALL = pytest.mark.parametrize("name", CALLS)


def as_tuple(out) -> tuple:
    return out if isinstance(out, tuple) else (out,)


def by_name(out, gradients) -> dict:
    return {str(place): each for place, each in enumerate(as_tuple(out))} | gradients


@EACH_CALL
def test_twins_agree(name):
    ours, theirs, config, arrays = CALLS[name]
    leaves = {key: entry.clone().requires_grad_() for key, entry in parameters(config).items()}
    out = as_tuple(ours(leaves, *arrays, config=config))
    cotangents = tuple(random(*each.shape, seed=60 + place) for place, each in enumerate(out))
    gradients = dict(zip(leaves, torch.autograd.grad(out, [*leaves.values()], cotangents), strict=True))
    with jax.enable_x64(True):
        function = jax.jit(lambda state: as_tuple(theirs(state, *to_jax(arrays), config=config)))
        found, pull_back = jax.vjp(function, to_jax(parameters(config)))
        (found_gradients,) = pull_back(to_jax(cotangents))
    assert_agree(by_name(found, found_gradients), by_name(tuple(each.detach() for each in out), gradients))


@EACH_CALL
def test_half_precision_is_rounded_once(name):
    ours, _, config, arrays = CALLS[name]
    narrow = {key: entry.bfloat16() for key, entry in parameters(config).items()}
    wide = {key: entry.float() for key, entry in narrow.items()}
    narrow_arrays = [each.bfloat16() if each.is_floating_point() else each for each in arrays]
    wide_arrays = [each.float() if each.is_floating_point() else each for each in narrow_arrays]
    outs = as_tuple(ours(narrow, *narrow_arrays, config=config)), as_tuple(ours(wide, *wide_arrays, config=config))
    for place, (actual, expected) in enumerate(zip(*outs, strict=True)):
        kept = torch.float32 if (name, place) == ("moe", 1) else torch.bfloat16
        assert actual.dtype == kept and torch.equal(actual, expected.to(kept))


@pytest.mark.parametrize("jax_too", [False, True], ids=["torch", "jax"])
@EACH_CALL
def test_no_sequence_is_a_call(name, jax_too):
    ours, theirs, config, arrays = CALLS[name]
    arrays = [each[:, :0] if each.ndim == 5 else each[:0] for each in arrays]
    if jax_too:
        out = theirs(to_jax({key: each.float() for key, each in parameters(config).items()}), *(
            to_jax(each.float() if each.is_floating_point() else each) for each in arrays
        ), config=config)  # fmt: skip
    else:
        out = ours(parameters(config), *arrays, config=config)
    assert tuple(as_tuple(out)[0].shape) == (0, 11, 40)


PUBLISHED = {
    "SDAR-8B": (SDAR_PRESETS, sdar, 8_190_735_360),
    "SDAR-30B-A3B": (SDAR_MOE_PRESETS, sdar, 30_532_122_624),
    "LLaDA-8B": (LLADA_PRESETS, llada, 8_015_581_184),
    "Dream-7B": (DREAM_PRESETS, dream, 7_615_616_512),
}
CAUSAL_LMS = {
    SDARConfig: transformers.Qwen3ForCausalLM,
    SDARMoEConfig: transformers.Qwen3MoeForCausalLM,
    LLaDAConfig: transformers.LlamaForCausalLM,
    DreamConfig: transformers.Qwen2ForCausalLM,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_models(name):
    presets, module, count = PUBLISHED[name]
    config = presets[name]
    assert states.num_parameters(module.state_shapes(config)) == count
    with torch.device("meta"):
        model = CAUSAL_LMS[type(config)](their_config(config))
    theirs = {name: tuple(each.shape) for name, each in model.named_parameters()}
    shapes = decoder_states.state_shapes(config)
    assert theirs == shapes
    assert len(set(module.state_shapes(config))) == len(shapes)


def test_names_of_llada_are_those_of_its_checkpoint():
    names = [*llada.state_shapes(replace(LLADA, num_hidden_layers=1))]
    own = ("q_proj", "k_proj", "v_proj", "attn_out", "attn_norm", "ff_norm", "ff_proj", "up_proj", "ff_out")
    around = ("wte", "ln_f", "ff_out")
    layer = [f"model.transformer.blocks.0.{name}.weight" for name in own]
    assert sorted(names) == sorted([*layer, *(f"model.transformer.{name}.weight" for name in around)])


@pytest.mark.parametrize("config", [DENSE, SPARSE, DREAM], ids=["dense", "moe", "dream"])
def test_a_checkpoint_of_transformers_is_a_state(tmp_path, config):
    model = CAUSAL_LMS[type(config)](their_config(config))
    model.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    if config is SPARSE:
        assert "model.layers.1.mlp.experts.4.gate_proj.weight" in state
    if config is not DREAM:
        loaded = jax_sdar.load_state(to_jax(state), config=config)
        state = sdar.load_state(state, config=config)
        for name, entry in state.items():
            np.testing.assert_array_equal(loaded[name], entry)
        assert sdar.load_state(state, config=config).keys() == state.keys()
    assert all(torch.equal(state[name], each) for name, each in model.named_parameters())
    (dream.dream if config is DREAM else sdar.sdar if config is DENSE else sdar.sdar_moe)(state, IDS, config=config)


@pytest.mark.parametrize("module", [sdar, jax_sdar], ids=["torch", "jax"])
def test_bad_calls_name_the_argument(module):
    state, ids, samples, past = parameters(DENSE), IDS, SAMPLES, no_past(DENSE, 2)
    state = {name: each.float() for name, each in state.items()}
    past = tuple(each.float() for each in past)
    if module is jax_sdar:
        state, ids, samples, past = to_jax((state, ids, samples, past))
    call, cached, training = (
        functools.partial(each, config=DENSE) for each in (module.sdar, module.sdar_cached, module.sdar_training)
    )
    four = tuple(random(2, 2, 2, 4, 6, seed=seed).float() for seed in range(2))
    four = to_jax(four) if module is jax_sdar else four
    head = "lm_head.weight"
    for function, message in (
        (lambda: call(state, ids[0]), "input_ids must be [batch_size, num_tokens], got (11,)"),
        (lambda: call(state, ids[:, :0]), "input_ids must have one token at least, got (2, 0)"),
        (lambda: call(state, ids + 1), "input_ids must be in 0..39, got 1..40"),
        (lambda: module.sdar(state, ids, config=LLADA), "config must be SDARConfig, got LLaDAConfig"),
        (lambda: module.sdar_moe(state, ids, config=DENSE), "config must be SDARMoEConfig, got SDARConfig"),
        (lambda: module.state_shapes(DREAM), "config must be SDARConfig or SDARMoEConfig, got DreamConfig"),
        (lambda: call({k: v for k, v in state.items() if k != head}, ids), "state must have lm_head.weight, got none"),
        (lambda: call(state | {head: state[head].astype(jnp.bfloat16) if module is jax_sdar else state[head].bfloat16()}, ids),
         "state must have lm_head.weight in the dtype of model.embed_tokens.weight, float32, got bfloat16"),
        (lambda: cached(state, ids, past[0][1:], past[1]), "past_keys must be [num_hidden_layers=2, batch_size=2, num_key_"),
        (lambda: cached(state, ids, *four), "past_keys must have a number of tokens that is a multiple of block_length=3, got 4"),
        (lambda: cached(state, ids, past[0], four[1]), "past_values must be [num_hidden_layers=2, batch_size=2, num_key_val"),
        (lambda: training(state, ids, ids[:, 1:], samples), "clean_ids must be [batch_size=2, num_tokens=11], got (2, 10)"),
        (lambda: training(state, ids, ids - 1, samples), "clean_ids must be in 0..39, got -1..38"),
        (lambda: training(state, ids, ids, samples > 0), "sample_ids must be int32 or int64, got bool"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
            function()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (DENSE, {"vocab_size": 0}, "vocab_size must be positive, got 0"),
        (DENSE, {"intermediate_size": 0}, "intermediate_size must be positive, got 0"),
        (DENSE, {"block_length": 0}, "block_length must be positive, got 0"),
        (DENSE, {"num_key_value_heads": 3}, "num_attention_heads must be a multiple of 3, got 4"),
        (DENSE, {"head_dim": 5}, "head_dim must be even, got 5"),
        (DENSE, {"rms_norm_eps": 0.0}, "rms_norm_eps must be positive and finite, got 0.0"),
        (LLADA, {"rope_theta": float("inf")}, "rope_theta must be positive and finite, got inf"),
        (DREAM, {"mask_token_id": 40}, "mask_token_id must be in 0..39, got 40"),
        (SPARSE, {"num_experts_per_tok": 6}, "num_experts_per_tok must be in 1..5, got 6"),
        (SPARSE, {"moe_intermediate_size": 0}, "moe_intermediate_size must be positive, got 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        replace(config, **options)


@pytest.mark.parametrize(
    "module", [llada, dream, sdar, jax_llada, jax_dream, jax_sdar], ids=lambda each: each.__name__.split(".", 2)[2]
)
def test_shapes_of_another_model_are_not_told(module):
    other = DREAM if module in (llada, jax_llada) else LLADA
    with pytest.raises(TypeError, match=f"^config must be .*Config, got {type(other).__name__}"):
        module.state_shapes(other)
