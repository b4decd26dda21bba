"""SDAR, LLaDA and Dream in JAX over the ranks of a mesh, on four CPU devices, against the PyTorch references."""

from dataclasses import replace

import jax
import pytest
import torch
from agreement import assert_agree
from on_jax_ranks import assert_is_reference, exchanges_of, parts_of
from test_jax_sharded_dit import mesh_of, to_jax
from test_language_models_on_ranks import CALLS, DENSE, LLADA, REFERENCES, SPARSE, arrays_of, state_of

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax import sharded_decoders, sharded_models

RANKS = {"llada": (4,), "dream": (1, 2, 4), "sdar": (4,), "sdar_moe": (1, 2, 4), "sdar_cached": (4,), "sdar_training": (4,)}


@pytest.mark.parametrize(("operation", "config"), CALLS)
def test_models_over_ranks_are_the_reference(operation, config):
    sharded, arrays = getattr(sharded_decoders, operation), arrays_of(operation, config)
    assert_is_reference(REFERENCES[operation], sharded, state_of(config), arrays, config=config, ranks=RANKS[operation])


@pytest.mark.parametrize(("operation", "config"), [("llada", LLADA), ("sdar_moe", SPARSE), ("sdar_cached", DENSE)])
def test_a_branch_has_a_sum_and_so_has_the_embedding_and_nothing_else_moves(operation, config):
    of_placed = getattr(sharded_decoders, operation).of_placed
    rules, arrays = partition_rules.of_decoder(config), arrays_of(operation, config)
    moved = exchanges_of(of_placed, rules, state_of(config), arrays, config=config)
    assert moved == {"all-reduce": 2 * config.num_hidden_layers + 1}


def test_a_rank_holds_its_part():
    parts = parts_of(state_of(SPARSE), partition_rules.of_decoder(SPARSE), rank=3)
    layer = "model.layers.1"
    assert parts[f"{layer}.self_attn.q_proj.weight"] == (12, 10) and parts[f"{layer}.self_attn.v_proj.weight"] == (6, 10)
    assert parts[f"{layer}.self_attn.o_proj.weight"] == (10, 12) and parts[f"{layer}.self_attn.k_norm.weight"] == (6,)
    assert parts[f"{layer}.mlp.gate.weight"] == (4, 10) and parts[f"{layer}.mlp.experts.gate_up_proj"] == (1, 14, 10)
    assert parts["model.embed_tokens.weight"] == parts["lm_head.weight"] == (5, 10)


def test_logits_and_what_is_kept_stay_where_they_were_made():
    config, mesh, (ids, *past) = DENSE, mesh_of(4), arrays_of("sdar_cached", DENSE)
    with jax.enable_x64(True):
        placed = sharded_models.shard_state(to_jax(state_of(config)), partition_rules.of_decoder(config), mesh)
        nothing = to_jax([each[:, :, :, :0] for each in past])
        _, *kept = sharded_decoders.sdar_cached.of_placed(placed, to_jax(ids[:, :6]), *nothing, config=config, mesh=mesh)
        logits, *own = sharded_decoders.sdar_cached.of_placed(placed, to_jax(ids[:, 6:]), *kept, config=config, mesh=mesh)
    assert [each.addressable_shards[3].data.shape for each in kept] == [(2, 2, 1, 6, 6)] * 2
    assert [each.addressable_shards[3].data.shape for each in (logits, *own)] == [(2, 1, 5), (2, 2, 1, 1, 6), (2, 2, 1, 1, 6)]
    whole = REFERENCES["sdar"](state_of(config), ids, config=config)
    assert_agree({"logits": logits}, {"logits": whole[:, 6:]})


@pytest.mark.parametrize(
    ("config", "size", "value"),
    [
        (DENSE, "num_key_value_heads", 2),
        (LLADA, "intermediate_size", 14),
        (LLADA, "vocab_size", 22),
        (SPARSE, "num_experts", 6),
    ],
)
def test_what_does_not_fit_is_named(config, size, value):
    operation = {DENSE: "sdar", LLADA: "llada", SPARSE: "sdar_moe"}[config]
    config = replace(config, **{size: value})
    with pytest.raises(ValueError, match=f"^{size} must be a multiple of the 4 ranks that share it, got {value}"):
        called(operation, config)


def called(operation, config):
    arrays = to_jax(arrays_of(operation, config)[:1])
    return getattr(sharded_decoders, operation)(to_jax(state_of(config)), *arrays, config=config, mesh=mesh_of(4))


def test_ids_out_of_range_are_told_before_the_ranks_see_them():
    state = to_jax(state_of(LLADA))
    with pytest.raises(ValueError, match=r"^input_ids must be in"):
        sharded_decoders.llada(state, to_jax(torch.tensor([[20]])), config=LLADA, mesh=mesh_of(4))
    mesh = jax.make_mesh((2, 2), ("data", "ranks"), devices=jax.devices())
    with pytest.raises(ValueError, match=r'^mesh must have the one axis "ranks"'):
        sharded_decoders.llada(state, to_jax(torch.tensor([[19]])), config=LLADA, mesh=mesh)
