"""CLIP's text encoder in JAX over the ranks of a mesh, on four CPU devices, against the PyTorch reference."""

from dataclasses import replace

import jax
import pytest
import torch
from on_jax_ranks import assert_is_reference, exchanges_of, parts_of
from test_jax_sharded_dit import mesh_of, state_of, to_jax

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax import sharded_clip_text
from gaugeblock.reference.configs import CLIPTextConfig
from gaugeblock.reference.torch import clip_text

CONFIG = CLIPTextConfig(
    vocab_size=9, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=7,
    projection_dim=5, returned_layer=-2, normalize_returned=False,
)  # fmt: skip
IDS = torch.tensor([[1, 4, 2, 8, 3], [5, 8, 0, 0, 0], [1, 1, 2, 6, 8]])
MASK = torch.tensor([[True] * 5, [True, True, False, False, False], [False, True, True, True, True]])


@pytest.mark.parametrize(
    ("changes", "mask"),
    [({}, MASK), ({"projection_dim": None, "hidden_act": "gelu", "returned_layer": -1, "normalize_returned": True}, None)],
)
def test_the_model_over_ranks_is_the_reference(changes, mask):
    config = replace(CONFIG, **changes)
    state = state_of(config, clip_text.state_shapes)
    assert_is_reference(clip_text.clip_text, sharded_clip_text.clip_text, state, [IDS, mask], config=config)


def test_a_branch_has_a_sum_and_nothing_else_moves():
    state = state_of(CONFIG, clip_text.state_shapes)
    of_placed = sharded_clip_text.clip_text_of_placed
    moved = exchanges_of(of_placed, partition_rules.CLIP_TEXT, state, [IDS, MASK], config=CONFIG)
    assert moved == {"all-reduce": 2 * CONFIG.num_hidden_layers}


def test_a_rank_holds_its_part():
    parts = parts_of(state_of(CONFIG, clip_text.state_shapes), partition_rules.CLIP_TEXT, rank=3)
    layer = "text_model.encoder.layers.1"
    assert parts[f"{layer}.self_attn.k_proj.weight"] == (6, 24) and parts[f"{layer}.self_attn.v_proj.bias"] == (6,)
    assert parts[f"{layer}.self_attn.out_proj.weight"] == (24, 6) and parts[f"{layer}.self_attn.out_proj.bias"] == (24,)
    assert parts[f"{layer}.mlp.fc1.weight"] == (5, 24) and parts[f"{layer}.mlp.fc2.weight"] == (24, 5)
    assert parts["text_model.embeddings.token_embedding.weight"] == (9, 24)


@pytest.mark.parametrize(("size", "value"), [("num_attention_heads", 6), ("intermediate_size", 22)])
def test_what_does_not_fit_is_named(size, value):
    config = replace(CONFIG, **{size: value})
    with pytest.raises(ValueError, match=f"^{size} must be a multiple of the 4 ranks that share it, got {value}"):
        call(config, mesh_of(4))


def test_a_mesh_of_other_axes_is_refused():
    mesh = jax.make_mesh((2, 2), ("data", "ranks"), devices=jax.devices())
    with pytest.raises(ValueError, match=r'^mesh must have the one axis "ranks"'):
        call(CONFIG, mesh)
    with pytest.raises(TypeError, match=r"^mesh must be a jax.sharding.Mesh, got int"):
        call(CONFIG, 4)


def test_ids_out_of_range_are_told_before_the_ranks_see_them():
    state = to_jax(state_of(CONFIG, clip_text.state_shapes))
    with pytest.raises(ValueError, match=r"^input_ids must be in"):
        sharded_clip_text.clip_text(state, to_jax(IDS + 1), config=CONFIG, mesh=mesh_of(4))


def call(config, mesh):
    return sharded_clip_text.clip_text(to_jax(state_of(config, clip_text.state_shapes)), to_jax(IDS), config=config, mesh=mesh)
