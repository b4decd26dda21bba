"""CLIP's text encoder against transformers' own, against its twin, and by itself."""

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

from gaugeblock.reference import states
from gaugeblock.reference.configs import CLIP_TEXT_PRESETS, CLIPTextConfig
from gaugeblock.reference.jax import clip_text as jax_clip_text
from gaugeblock.reference.torch import clip_text

# sizes that differ pairwise, so that none can stand for another
SMALL = CLIPTextConfig(
    vocab_size=40, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=9,
    layer_norm_eps=1e-3,
)  # fmt: skip
PROJECTED = replace(
    SMALL, hidden_act="gelu", projection_dim=14, eos_token_id=7, returned_layer=-2, normalize_returned=False, num_hidden_layers=2
)
CONFIGS = {
    "small": SMALL,
    "projected": PROJECTED,
    "second-normalized": replace(SMALL, returned_layer=2, eos_token_id=39),
    "embeddings": replace(PROJECTED, returned_layer=-3, layer_norm_eps=1e-5, projection_dim=None),
}
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
EACH_TWIN = pytest.mark.parametrize("module", [clip_text, jax_clip_text], ids=["torch", "jax"])
MASKS = {
    "none": None,
    "all": torch.ones(3, 8, dtype=torch.bool),
    # padding at the end, in the middle, and at the start, where the first tokens see nothing
    "padding": torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]]).bool(),
}
IDS = torch.tensor([[1, 39, 2, 7, 39, 7, 0, 0], [7, 5, 5, 38, 38, 39, 3, 39], [4, 6, 8, 9, 39, 2, 2, 7]])


def of_transformers(config: CLIPTextConfig) -> torch.nn.Module:
    """Return transformers' model with the parameters that it draws itself."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    others = ("max_position_embeddings", "hidden_act", "layer_norm_eps", "eos_token_id")
    sizes = {name: getattr(config, name) for name in names + others}
    theirs = transformers.CLIPTextConfig(**sizes, projection_dim=config.pooled_size, bos_token_id=0, pad_token_id=1)
    has_projection = config.projection_dim is not None
    return (transformers.CLIPTextModelWithProjection if has_projection else transformers.CLIPTextModel)(theirs).eval()


@functools.cache
def model_of_transformers(config: CLIPTextConfig) -> torch.nn.Module:
    """Return transformers' model in float64 with random weights, none of which is 0 or 1."""
    model = of_transformers(config).double()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = random(*parameter.shape, seed=seed) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    return model


def results_of_transformers(config: CLIPTextConfig, ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    model = model_of_transformers(config)
    out = model(ids, attention_mask=None if mask is None else mask.long(), output_hidden_states=True)
    norm = model.get_submodule("final_layer_norm" if config.projection_dim is None else "text_model.final_layer_norm")
    hidden = out.hidden_states[config.returned_layer]
    pooled = out.pooler_output if config.projection_dim is None else out.text_embeds
    return norm(hidden) if config.normalize_returned else hidden, pooled


def cotangents(config: CLIPTextConfig) -> list[torch.Tensor]:
    return [random(3, 8, config.hidden_size, seed=60), random(3, config.pooled_size, seed=61)]


def to_jax(tensors):
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), tensors)


def results(config: CLIPTextConfig, state: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor | None) -> dict:
    """Return hidden states, what is pooled, and the gradients of all parameters, by name."""
    leaves = {name: entry.detach().requires_grad_() for name, entry in state.items()}
    out = clip_text.clip_text(leaves, ids, mask, config=config)
    gradients = torch.autograd.grad(out, [*leaves.values()], cotangents(config))
    return dict(zip(["hidden_states", "pooled", *leaves], [*(each.detach() for each in out), *gradients], strict=True))


def loaded_parameters(config: CLIPTextConfig) -> dict[str, torch.Tensor]:
    return clip_text.load_state(dict(model_of_transformers(config).named_parameters()), config=config)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@EACH_CONFIG
def test_clip_text_is_that_of_transformers(config, mask):
    state = loaded_parameters(config)
    out = results_of_transformers(config, IDS, mask)
    gradients = torch.autograd.grad(out, [*state.values()], cotangents(config))
    expected = dict(zip(["hidden_states", "pooled", *state], [*(each.detach() for each in out), *gradients], strict=True))
    assert all(each.abs().max() > 1e-5 for name, each in expected.items() if not name.endswith("k_proj.bias"))
    assert_agree(results(config, state, IDS, mask), expected)


@EACH_CONFIG
def test_one_caption_of_one_token_and_a_full_one(config):
    for ids in (torch.tensor([[7]]), IDS[:1, [0, 1, 2, 3, 3, 4, 5, 6, 7]]):
        if config.eos_token_id not in (2, *ids[0].tolist()):
            continue
        hidden, pooled = clip_text.clip_text(loaded_parameters(config), ids, config=config)
        expected = results_of_transformers(config, ids, None)
        assert_agree({"hidden": hidden.detach(), "pooled": pooled.detach()}, {
            "hidden": expected[0].detach(), "pooled": expected[1].detach()
        })  # fmt: skip


@EACH_TWIN
def test_the_caption_ends_at_the_first_of_its_last_tokens(module):
    ids = jnp.asarray(IDS.numpy()) if module is jax_clip_text else IDS
    assert module.eos_places(ids, config=SMALL).tolist() == [1, 5, 4]
    assert module.eos_places(ids, config=PROJECTED).tolist() == [3, 0, 7]


def test_no_token_sees_what_comes_after_it():
    state = {name: entry.detach() for name, entry in loaded_parameters(SMALL).items()}
    changed = IDS.clone()
    changed[:, 5:] = 11
    before, after = (clip_text.clip_text(state, ids, config=SMALL)[0] for ids in (IDS, changed))
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


# the number of parameters of the text encoders of Stable Diffusion 1, 2 and XL
PUBLISHED = {"clip-l": 123_060_480, "openclip-h": 340_387_840, "openclip-bigg": 694_659_840}


@pytest.mark.parametrize("name", CLIP_TEXT_PRESETS)
def test_presets_are_the_published_models(name):
    config = CLIP_TEXT_PRESETS[name]
    shapes = clip_text.state_shapes(config)
    assert states.num_parameters(shapes) == PUBLISHED[name]
    with torch.device("meta"):
        model = of_transformers(config)
    assert model.num_parameters() == PUBLISHED[name]
    prefix = "" if config.projection_dim else "text_model."
    assert {f"{prefix}{name}": tuple(each.shape) for name, each in model.named_parameters()} == shapes


@pytest.mark.parametrize("position_ids", [None, torch.arange(9)[None], torch.arange(9).half()[None]])
@pytest.mark.parametrize("config", [SMALL, PROJECTED], ids=["small", "projected"])
def test_a_checkpoint_of_transformers_gives_its_results(tmp_path, config, position_ids):
    of_transformers(config).save_pretrained(tmp_path)
    checkpoint = safetensors.torch.load_file(tmp_path / "model.safetensors")
    if config is SMALL:  # as version 5 of transformers saves it, or, with the places' ids, as older ones did
        assert not any(name.startswith("text_model.") for name in checkpoint)
    if position_ids is not None:
        prefixed = (name if name.startswith("text_") else f"text_model.{name}" for name in checkpoint)
        checkpoint = dict(zip(prefixed, checkpoint.values(), strict=True))
        checkpoint["text_model.embeddings.position_ids"] = position_ids
    state = clip_text.load_state(checkpoint, config=config)
    assert list(state) == list(clip_text.state_shapes(config))
    jax_state = jax_clip_text.load_state(to_jax(checkpoint), config=config)
    assert list(jax_state) == list(state)
    for name, entry in state.items():
        np.testing.assert_array_equal(jax_state[name], entry)

    model = of_transformers(config).from_pretrained(tmp_path).double().eval()
    out = model(IDS, output_hidden_states=True)
    wide = {name: entry.double() for name, entry in state.items()}
    hidden, pooled = clip_text.clip_text(wide, IDS, config=replace(config, returned_layer=1, normalize_returned=False))
    expected = {"hidden": out.hidden_states[1].detach(), "pooled": out[1 if config is SMALL else 0].detach()}
    assert_agree({"hidden": hidden, "pooled": pooled}, expected)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("config", [SMALL, PROJECTED], ids=["small", "projected"])
def test_twins_agree(config, mask):
    state = {name: entry.detach() for name, entry in loaded_parameters(config).items()}
    with jax.enable_x64(True):
        ids, jax_mask = to_jax([IDS, mask]) if mask is not None else (to_jax(IDS), None)
        function = jax.jit(lambda state: jax_clip_text.clip_text(state, ids, jax_mask, config=config))
        out, pull_back = jax.vjp(function, to_jax(state))
        (gradients,) = pull_back(tuple(to_jax(cotangents(config))))
    actual = {"hidden_states": out[0], "pooled": out[1], **gradients}
    assert_agree(actual, results(config, state, IDS, mask))


@EACH_TWIN
def test_half_precision_is_rounded_once(module):
    narrow = {name: entry.detach().bfloat16() for name, entry in loaded_parameters(PROJECTED).items()}
    wide, ids = {name: entry.float() for name, entry in narrow.items()}, IDS
    if module is jax_clip_text:
        wide, ids = to_jax([wide, ids])
        narrow = {name: entry.astype(jnp.bfloat16) for name, entry in wide.items()}
    outs = (module.clip_text(state, ids, config=PROJECTED) for state in (narrow, wide))
    for actual, expected in zip(*outs, strict=True):
        assert "bfloat16" in str(actual.dtype) and "float32" in str(expected.dtype)
        rounded = expected.astype(jnp.bfloat16) if module is jax_clip_text else expected.bfloat16()
        assert bool((actual == rounded).all())


@EACH_TWIN
def test_no_caption_is_a_call(module):
    state, ids = {name: entry.detach().float() for name, entry in loaded_parameters(PROJECTED).items()}, IDS[:0]
    if module is jax_clip_text:
        state, ids = to_jax([state, ids])
    for mask in (None, ids == 0):
        hidden, pooled = module.clip_text(state, ids, mask, config=PROJECTED)
        assert (hidden.shape, pooled.shape) == ((0, 8, 24), (0, 14))


@EACH_TWIN
def test_bad_calls_name_the_argument(module):
    state, ids = {name: entry.detach().float() for name, entry in loaded_parameters(PROJECTED).items()}, IDS
    if module is jax_clip_text:
        state, ids = to_jax([state, ids])
    call, load = (functools.partial(each, config=PROJECTED) for each in (module.clip_text, module.load_state))
    embedding = "text_model.embeddings.token_embedding.weight"
    positions = "text_model.embeddings.position_ids"
    projection = "text_projection.weight"
    narrow = state[embedding].astype(jnp.bfloat16) if module is jax_clip_text else state[embedding].bfloat16()
    for function, message in (
        (lambda: call(state, state[embedding]), "input_ids must be int32 or int64, got float32"),
        (lambda: call(state, ids[0]), "input_ids must be [batch_size, num_tokens], got (8,)"),
        (lambda: call(state, ids[:, :0]), "input_ids must have 1..9 tokens, got 0"),
        (lambda: call(state, ids[:, np.zeros(10, int)]), "input_ids must have 1..9 tokens, got 10"),
        (lambda: call(state, ids + 1), "input_ids must be in 0..39, got 1..40"),
        (lambda: call(state, ids * 0 + 8), "input_ids must have eos_token_id=7 in every row"),
        (lambda: call(state, ids, ids), "attention_mask must be bool, got int"),
        (lambda: call(state, ids, ids[:1] > 0), "attention_mask must be [batch_size=3, num_tokens=8], got (1, 8)"),
        (
            lambda: call({**state, embedding: narrow}, ids),
            f"state must have {embedding.replace('token', 'position')} in the dtype of {embedding}, bfloat16, got float32",
        ),
        (lambda: call({k: v for k, v in state.items() if k != projection}, ids), "state must have text_projection.weight"),
        (lambda: call([], ids), "state must be a dict of arrays"),
        (lambda: load({**state, positions: ids[:1, :1] * 0}), f"state['{positions}'] must be [one=1, places=9], got (1, 1)"),
        (lambda: load({**state, positions: ids[:1, np.zeros(9, int)]}), f"state must have {positions} 0, 1, 2, ... or none"),
        (lambda: load({**state, "logit_scale": ids}), "state must have no other entries, got text_model.logit_scale"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
            function()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be positive, got 0"),
        ({"num_attention_heads": 7}, "hidden_size must be a multiple of 7, got 768"),
        ({"hidden_act": "relu"}, "hidden_act must be 'quick_gelu' or 'gelu', got 'relu'"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be positive and finite, got 0.0"),
        ({"eos_token_id": 49408}, "eos_token_id must be in 0..49407, got 49408"),
        ({"projection_dim": 0}, "projection_dim must be positive or None, got 0"),
        ({"returned_layer": 13}, "returned_layer must be in -13..12, got 13"),
        ({"returned_layer": -14}, "returned_layer must be in -13..12, got -14"),
    ],
)
def test_a_config_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        CLIPTextConfig(**options)
