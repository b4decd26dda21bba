"""The UNets in JAX over the ranks of a mesh, on four CPU devices, against the PyTorch references."""

from dataclasses import replace

import jax
import pytest
import torch
from on_jax_ranks import assert_is_reference, exchanges_of, parts_of
from test_jax_sharded_dit import mesh_of, state_of, to_jax
from test_references import random

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax import sharded_unet
from gaugeblock.reference.configs import UNET_PRESETS, UNetConfig
from gaugeblock.reference.torch import unet
from gaugeblock.reference.unet_states import state_shapes

CONFIG = UNetConfig(
    in_channels=3, out_channels=2, block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    layers_per_block=1, transformer_layers_per_block=(1, 1), attention_head_dim=(4, 8), cross_attention_dim=6, norm_num_groups=4,
)  # fmt: skip
SMALL = replace(
    CONFIG, block_out_channels=(12,), down_block_types=("DownBlock2D",), transformer_layers_per_block=(1,),
    attention_head_dim=(4,), use_linear_projection=True, addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=5 + 2 * 4,
)  # fmt: skip
TIMES = torch.tensor([2.0, 0.5])
MASK = torch.tensor([[True, False, True], [False, False, True]])
ARRAYS = [random(2, 3, 3, 4, seed=90), TIMES, random(2, 3, 6, seed=91)]
WITH_SIZES = [*ARRAYS, random(2, 5, seed=92), torch.tensor([[3.0, 0.0], [1.0, 2.0]])]


def test_the_model_over_ranks_is_the_reference():
    state = state_of(CONFIG, state_shapes)
    assert_is_reference(unet.unet, sharded_unet.unet, state, [*ARRAYS, MASK], config=CONFIG, ranks=(4,))


def test_the_model_with_sizes_over_ranks_is_the_reference():
    state = state_of(SMALL, state_shapes)
    operations = unet.unet_text_time, sharded_unet.unet_text_time
    assert_is_reference(*operations, state, [*WITH_SIZES, None], config=SMALL)


def test_blocks_have_a_sum_for_each_branch_and_nothing_else_moves():
    state = state_of(CONFIG, state_shapes)
    of_placed = sharded_unet.unet_of_placed
    moved = exchanges_of(of_placed, partition_rules.UNET, state, [*ARRAYS, MASK], config=CONFIG)
    resnets = sum(name.endswith("conv1.weight") for name in state)
    branches = sum(name.endswith(("to_out.0.weight", "ff.net.2.weight")) for name in state)
    assert moved == {"all-reduce": resnets + branches} == {"all-reduce": 8 + 3 * 4}


def test_a_rank_holds_its_part():
    state = state_of(CONFIG, state_shapes)
    parts = parts_of(state, partition_rules.UNET, rank=3)
    resnet, block = "mid_block.resnets.0", "down_blocks.0.attentions.0.transformer_blocks.0"
    assert parts[f"{resnet}.conv1.weight"] == (4, 16, 3, 3) and parts[f"{resnet}.conv2.weight"] == (16, 4, 3, 3)
    assert parts[f"{resnet}.time_emb_proj.weight"] == (4, 32) and parts[f"{resnet}.norm2.bias"] == (4,)
    assert parts[f"{block}.attn1.to_q.weight"] == (2, 8) and parts[f"{block}.attn2.to_v.weight"] == (2, 6)
    assert parts[f"{block}.attn2.to_out.0.weight"] == (8, 2)
    assert parts[f"{block}.ff.net.0.proj.weight"] == (2, 8, 8) and parts[f"{block}.ff.net.0.proj.bias"] == (2, 8)
    assert parts[f"{block}.ff.net.2.weight"] == (8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_num_groups": 2}, "norm_num_groups must be a multiple of the 4 ranks that share it, got 2"),
        ({"attention_head_dim": (2, 8)}, "gcd_of_heads must be a multiple of the 4 ranks that share it, got 2"),
        ({"attention_head_dim": (4, 2)}, "gcd_of_heads must be a multiple of the 4 ranks that share it, got 2"),  # of the middle
    ],
)
def test_what_the_ranks_do_not_divide_is_named(changes, message):
    config = replace(CONFIG, **changes)
    state = to_jax(state_of(config, state_shapes))
    with pytest.raises(ValueError, match=f"^{message}"):
        sharded_unet.unet(state, *to_jax(ARRAYS), config=config, mesh=mesh_of(4))


def test_a_mesh_of_other_axes_is_refused():
    mesh = jax.make_mesh((2, 2), ("data", "ranks"), devices=jax.devices())
    with pytest.raises(ValueError, match=r'^mesh must have the one axis "ranks"'):
        sharded_unet.unet_text_time(to_jax(state_of(SMALL, state_shapes)), *to_jax(WITH_SIZES), config=SMALL, mesh=mesh)


def test_heads_of_levels_without_transformers_do_not_count():
    assert {name: config.gcd_of_heads for name, config in UNET_PRESETS.items()} == {
        "SD-1.5": 8, "SD-2.1": 5, "SDXL-base": 10, "SDXL-refiner": 12,
    }  # fmt: skip
    assert replace(CONFIG, attention_head_dim=(4, 2)).gcd_of_heads == 2  # the middle has those of the last level
    assert SMALL.gcd_of_heads == 4
