"""Partition rules: they match every parameter, cut where a rank can compute by itself, and name what does not fit."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.partition_rules import Cut
from gaugeblock.reference.configs import (
    CLIP_TEXT_PRESETS,
    DIT_MOE_PRESETS,
    DIT_PRESETS,
    DREAM_PRESETS,
    FLUX_PRESETS,
    LLADA_PRESETS,
    MMDIT_PRESETS,
    SDAR_MOE_PRESETS,
    SDAR_PRESETS,
    UNET_PRESETS,
    VAE_PRESETS,
    DiTConfig,
    DiTMoEModelConfig,
)
from gaugeblock.reference.torch import clip_text, dit, dit_moe, dream, flux, llada, mmdit, sdar, vae
from gaugeblock.reference.unet_states import state_shapes as unet_state_shapes

MODELS = {
    **{name: (dit.state_shapes(config), config, partition_rules.DIT) for name, config in DIT_PRESETS.items()},
    **{name: (flux.state_shapes(config), config, partition_rules.FLUX) for name, config in FLUX_PRESETS.items()},
    **{name: (dit_moe.state_shapes(config), config, partition_rules.DIT_MOE) for name, config in DIT_MOE_PRESETS.items()},
    **{name: (mmdit.state_shapes(config), config, partition_rules.MMDIT) for name, config in MMDIT_PRESETS.items()},
    **{name: (unet_state_shapes(config), config, partition_rules.UNET) for name, config in UNET_PRESETS.items()},
    **{f"vae of {name}": (vae.state_shapes(config), config, partition_rules.VAE) for name, config in VAE_PRESETS.items()},
    **{name: (clip_text.state_shapes(config), config, partition_rules.CLIP_TEXT) for name, config in CLIP_TEXT_PRESETS.items()},
    **{
        name: (module.state_shapes(config), config, partition_rules.of_decoder(config))
        for module, presets in ((sdar, SDAR_PRESETS | SDAR_MOE_PRESETS), (llada, LLADA_PRESETS), (dream, DREAM_PRESETS))
        for name, config in presets.items()
    },
}
FIVE_HEADS = "SD-2.1"  # on its first level


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_published_model_can_be_dealt_to_two_ranks(name):
    shapes, config, rules = MODELS[name]
    if name != FIVE_HEADS:
        partition_rules.require_divisible(config, rules, ranks=2)
    cuts = partition_rules.cuts_of(shapes, rules)
    assert list(cuts) == list(shapes)
    for entry, cut in cuts.items():
        if cut is not None:
            # each block has as many rows for each head, feature or expert
            assert shapes[entry][cut.axis] % (cut.blocks * getattr(config, cut.size)) == 0, entry


def test_what_grows_with_the_width_squared_is_cut_but_for_what_steers():
    shapes = dit.state_shapes(DIT_PRESETS["DiT-XL/2"])
    cuts = partition_rules.cuts_of(shapes, partition_rules.DIT)
    whole = {name for name, cut in cuts.items() if cut is None and name.startswith("blocks.0.") and len(shapes[name]) > 1}
    assert whole == {"blocks.0.adaLN_modulation.1.weight"}


def test_a_rank_has_its_part_of_each_block():
    qkv = torch.arange(3 * 4 * 2).view(3, 4, 2)  # [queries keys values, heads, features]
    cut = partition_rules.cut_of("blocks.11.attn.qkv.bias", partition_rules.DIT)
    assert cut == Cut(0, "num_heads", blocks=3)
    for rank in range(2):
        mine = partition_rules.part(qkv.flatten(), cut, rank=rank, ranks=2)
        assert torch.equal(mine, qkv[:, 2 * rank : 2 * rank + 2].flatten())
        np.testing.assert_array_equal(partition_rules.part(jnp.asarray(qkv.flatten().numpy()), cut, rank=rank, ranks=2), mine)


def test_columns_of_flux_last_product_meet_what_the_rank_computes():
    """Attention's features and the hidden layer's lie in blocks; a rank's columns are those of its own of both."""
    config = FLUX_PRESETS["FLUX.1-dev"]
    block, rank, ranks = "single_transformer_blocks.0", 1, 4
    hidden, attended = torch.arange(config.intermediate_size), torch.arange(config.hidden_size)
    cuts = {name: partition_rules.cut_of(f"{block}.{name}", partition_rules.FLUX) for name in ("attn.to_v.bias", "proj_mlp.bias")}
    parts = [
        partition_rules.part(features, cut, rank=rank, ranks=ranks)
        for features, cut in zip((attended, hidden + config.hidden_size), cuts.values(), strict=True)
    ]
    columns = torch.arange(config.hidden_size + config.intermediate_size)[None]
    cut = partition_rules.cut_of(f"{block}.proj_out.weight", partition_rules.FLUX)
    assert torch.equal(partition_rules.part(columns, cut, rank=rank, ranks=ranks)[0], torch.cat(parts))


@pytest.mark.parametrize("cut", [Cut(0, "num_heads"), Cut(1, "num_heads"), Cut(0, "num_heads", blocks=3)])
def test_parts_are_the_whole(cut):
    whole = torch.randn(12, 24, generator=torch.Generator().manual_seed(0))
    parts = [partition_rules.part(whole, cut, rank=rank, ranks=4) for rank in range(4)]
    assert sum(each.numel() for each in parts) == whole.numel()
    assert torch.equal(torch.cat([each.flatten() for each in parts]).sort()[0], whole.flatten().sort()[0])
    assert torch.equal(partition_rules.part(whole, cut, rank=0, ranks=1), whole)
    assert partition_rules.part(whole, None, rank=3, ranks=4) is whole


def test_the_streams_of_mmdit_are_cut_alike():
    config = MMDIT_PRESETS["sd3.5-medium"]  # with a second attention, and norms of heads
    shapes = mmdit.state_shapes(config)
    cuts = partition_rules.cuts_of(shapes, partition_rules.MMDIT)
    blocks = range(config.num_layers)
    products = {name for name in shapes if name.startswith("transformer_blocks.") and name.endswith("weight")}
    whole = {name for name in products if cuts[name] is None and len(shapes[name]) > 1}
    assert whole == {
        f"transformer_blocks.{index}.{name}.linear.weight" for index in blocks for name in ("norm1", "norm1_context")
    }
    block = "transformer_blocks.0"
    assert cuts[f"{block}.attn2.to_q.bias"] == cuts[f"{block}.attn.add_v_proj.weight"] == Cut(0, "num_attention_heads")
    assert cuts[f"{block}.attn2.to_out.0.weight"] == cuts[f"{block}.attn.to_add_out.weight"] == Cut(1, "num_attention_heads")
    assert cuts[f"{block}.ff.net.0.proj.bias"] == cuts[f"{block}.ff_context.net.0.proj.weight"] == Cut(0, "hidden_size")


@pytest.mark.parametrize("name", ["SDAR-30B-A3B", "LLaDA-8B", "Dream-7B"])
def test_of_a_language_model_only_norms_and_routers_are_whole(name):
    shapes, _, rules = MODELS[name]
    whole = {entry.split(".")[-2] for entry, cut in partition_rules.cuts_of(shapes, rules).items() if cut is None}
    norms = {
        "SDAR-30B-A3B": {"input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm", "gate"},
        "LLaDA-8B": {"attn_norm", "ff_norm", "ln_f"},
        "Dream-7B": {"input_layernorm", "post_attention_layernorm", "norm"},
    }
    assert whole == norms[name]


def test_heads_of_queries_go_with_the_heads_of_keys_that_serve_them():
    config = MODELS["Dream-7B"][1]
    served = torch.arange(config.num_key_value_heads).repeat_interleave(config.num_attention_heads // config.num_key_value_heads)
    attention = "model.layers.3.self_attn"
    cuts = [partition_rules.cut_of(f"{attention}.{name}_proj.bias", partition_rules.DECODER) for name in ("q", "k")]
    queries, keys = (
        partition_rules.part(each, cut, rank=1, ranks=2)
        for each, cut in zip((served, torch.arange(config.num_key_value_heads)), cuts, strict=True)
    )
    assert set(queries.tolist()) == set(keys.tolist())


def test_five_heads_are_not_for_two_ranks():
    _, config, rules = MODELS[FIVE_HEADS]
    with pytest.raises(ValueError, match=r"^gcd_of_heads must be a multiple of the 2 ranks that share it, got 5"):
        partition_rules.require_divisible(config, rules, ranks=2)


def test_between_the_convolutions_of_a_unet_all_is_cut_and_so_are_transformers_but_for_their_ends():
    shapes, _, rules = MODELS["SDXL-base"]
    cuts = partition_rules.cuts_of(shapes, rules)
    whole = {name for name, cut in cuts.items() if cut is None and name.startswith("mid_block.") and len(shapes[name]) > 1}
    assert whole == {"mid_block.attentions.0.proj_in.weight", "mid_block.attentions.0.proj_out.weight"}
    assert cuts["mid_block.resnets.1.time_emb_proj.bias"] == cuts["mid_block.resnets.1.norm2.weight"] == Cut(0, "norm_num_groups")
    assert cuts["up_blocks.0.resnets.0.conv1.weight"] == Cut(0, "norm_num_groups")
    assert cuts["up_blocks.0.resnets.0.conv2.weight"] == Cut(1, "norm_num_groups")
    block = "down_blocks.2.attentions.1.transformer_blocks.9"
    assert cuts[f"{block}.ff.net.0.proj.bias"] == Cut(0, "norm_num_groups", blocks=2)
    assert cuts[f"{block}.attn2.to_out.0.weight"] == Cut(1, "gcd_of_heads")


def test_a_name_that_no_rule_matches_is_told():
    message = r"^state must have parameters that a partition rule matches, got 'blocks.0.mlp.fc3.weight'"
    with pytest.raises(ValueError, match=message):
        partition_rules.cuts_of({"blocks.0.mlp.fc2.weight": None, "blocks.0.mlp.fc3.weight": None}, partition_rules.DIT)
    with pytest.raises(ValueError, match=r"got 'blocks\.0\.mlp\.fc2\.weight'"):  # of DiT, not of DiT-MoE
        partition_rules.cut_of("blocks.0.mlp.fc2.weight", partition_rules.DIT_MOE)


SMALL = DiTConfig(hidden_size=24, num_heads=4, depth=1)


@pytest.mark.parametrize(
    ("config", "rules", "ranks", "message"),
    [
        (replace(SMALL, num_heads=6), partition_rules.DIT, 4, "num_heads must be a multiple of the 4 ranks that share it, got 6"),
        (replace(SMALL, mlp_ratio=1.75), partition_rules.DIT, 4, "intermediate_size must be a multiple of the 4 ranks"),
        (
            DiTMoEModelConfig(hidden_size=24, num_heads=4, num_experts=6),
            partition_rules.DIT_MOE,
            4,
            "num_experts must be a multiple of the 4 ranks that share it, got 6",
        ),
    ],
)
def test_a_size_that_the_ranks_do_not_divide_is_told(config, rules, ranks, message):
    partition_rules.require_divisible(config, rules, ranks=2)
    with pytest.raises(ValueError, match=f"^{message}"):
        partition_rules.require_divisible(config, rules, ranks=ranks)
