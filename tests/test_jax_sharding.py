"""The JAX versions that are sharded over ranks, on four CPU devices, against the PyTorch references."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_references import (
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_EXPERTS,
    NUM_TOKENS,
    TOP_K,
    assert_all_equal_to_rounding,
    assert_equal_to_rounding,
    inputs_of_experts,
    jax_value_and_grads,
    random,
    value_and_grads,
)

from gaugeblock.optimized.jax import expert_parallel, sharded_experts, training
from gaugeblock.optimized.jax import train_image_diffusion as sharded
from gaugeblock.optimized.jax.mesh import mesh_of_layout, mesh_of_ranks
from gaugeblock.optimized.parallel_layout import ParallelLayout
from gaugeblock.reference.configs import DiTConfig, ImageDiffusionConfig
from gaugeblock.reference.torch import experts
from gaugeblock.reference.torch import train_image_diffusion as trainer

ROUTINGS = {
    "expert 0 is empty": lambda ids: ids,
    "all on one expert": lambda ids: torch.full_like(ids, NUM_EXPERTS - 1),
    "all on the last rank": lambda ids: NUM_EXPERTS - 1 - ids % 3,
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def mesh_of(num_ranks: int) -> Mesh:
    return jax.make_mesh((num_ranks,), ("ranks",), devices=jax.devices()[:num_ranks])


def to_jax(tensors):
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), tensors)


def inputs(num_tokens: int = NUM_TOKENS, routing: str = "expert 0 is empty"):
    """Return (hidden_states, w13, w2, topk_weights), topk_ids and a cotangent, in float64."""
    (hidden_states, w13, w2, topk_weights), ids, cotangent = inputs_of_experts(torch.float64)
    arrays = [hidden_states[:num_tokens], w13, w2, topk_weights[:num_tokens]]
    return arrays, ROUTINGS[routing](ids[:num_tokens]), cotangent[:num_tokens]


def assert_right_for_every_routing(function, reference=experts.fused_swiglu, more=()) -> None:
    """Compile value and gradients of `function(*floats, ids)` once, and compare them with the reference's.

    Args:
        more: What takes the place of w13 and w2 in the floats.
    """

    @jax.jit
    def value_and_gradients(floats, ids, cotangent):
        value, pull_back = jax.vjp(lambda *floats: function(*floats, ids), *floats)
        return [value, *pull_back(cotangent)]

    for routing in ROUTINGS:
        (hidden_states, w13, w2, topk_weights), ids, cotangent = inputs(routing=routing)
        arrays = [hidden_states, *(more or (w13, w2)), topk_weights]
        expected = value_and_grads(lambda *floats, ids=ids: reference(*floats, ids), arrays, cotangent)
        assert_all_equal_to_rounding(value_and_gradients(*to_jax((arrays, ids, cotangent))), expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_experts_on_any_number_of_ranks_are_the_reference(num_ranks):
    assert_right_for_every_routing(partial(expert_parallel.fused_swiglu, mesh=mesh_of(num_ranks)))


def biased(rows: int) -> tuple[torch.Tensor, ...]:
    """Weights of experts that give so many values at first; expert 0, which gets no rows, has a bias whose activation is NaN."""
    (_, w13, w2, _), _, _ = inputs()
    first, last = random(NUM_EXPERTS, rows, seed=6), random(NUM_EXPERTS, HIDDEN_SIZE, seed=7)
    first[0] = 1e200
    return w13[:, :rows], first, w2, last


OTHERS = {
    "fused_geglu": ({"approximate": "none"}, ()),
    "fused_gelu_mlp": ({"approximate": "tanh"}, biased(INTERMEDIATE_SIZE)),
    "fused_swiglu_oai": ({"alpha": 1.702, "limit": 1.0}, biased(2 * INTERMEDIATE_SIZE)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_experts_of_other_kinds_on_four_ranks_are_the_reference(name):
    options, more = OTHERS[name]
    ours = partial(getattr(expert_parallel, name), **options, mesh=mesh_of(4))
    assert_right_for_every_routing(ours, partial(getattr(experts, name), **options), more)


@pytest.mark.parametrize("name", ["fused_swiglu", "fused_swiglu_oai"])
def test_ragged_experts_of_accelerators_are_the_reference(name, monkeypatch):
    options, more = OTHERS.get(name, ({}, ()))
    of_cpu = expert_parallel.over_ranks
    monkeypatch.setattr(expert_parallel, "over_ranks", lambda *call, load, **sizes: of_cpu(*call, load=None, **sizes))
    ours = partial(getattr(expert_parallel, name), **options, mesh=mesh_of(4))
    assert_right_for_every_routing(ours, partial(getattr(experts, name), **options), more)


@pytest.mark.parametrize(
    ("num_ranks", "num_tokens", "routing"),
    [
        (2, 33, "all on one expert"),
        (4, 33, "expert 0 is empty"),
        (4, 2, "expert 0 is empty"),
        (4, 0, "expert 0 is empty"),
    ],
)
def test_experts_are_the_reference_where_the_ids_decide_how_much_room_there_is(num_ranks, num_tokens, routing):
    arrays, ids, cotangent = inputs(num_tokens, routing)
    expected = value_and_grads(lambda *floats: experts.fused_swiglu(*floats, ids), arrays, cotangent)

    def on_ranks(*floats):
        return expert_parallel.fused_swiglu(*floats, to_jax(ids), mesh=mesh_of(num_ranks))

    actual = jax_value_and_grads(on_ranks, arrays, cotangent)
    assert_all_equal_to_rounding(actual, expected)
    for once, again in zip(actual, jax_value_and_grads(on_ranks, arrays, cotangent), strict=True):
        np.testing.assert_array_equal(once, again)


def test_nan_in_one_token_or_expert_stays_with_it():
    arrays, ids, cotangent = inputs()
    arrays[0][7, 0] = torch.nan
    arrays[1][5, 0, 0] = torch.nan
    out, grad_hidden_states, *_ = jax_value_and_grads(
        lambda *floats: expert_parallel.fused_swiglu(*floats, jnp.asarray(ids.numpy()), mesh=mesh_of(4)), arrays, cotangent
    )
    touched = (ids == 5).any(dim=1) | (torch.arange(NUM_TOKENS) == 7)
    for rows in (out, grad_hidden_states):
        np.testing.assert_array_equal(np.isnan(np.asarray(rows)).any(axis=1), touched)


def test_tokens_move_and_experts_do_not():
    arrays, ids, cotangent = inputs(num_tokens=32)
    over_ranks = NamedSharding(mesh_of_ranks(mesh_of(4)), PartitionSpec("ranks"))
    floats, ids, cotangent = jax.device_put(to_jax((arrays, ids, cotangent)), over_ranks)

    @jax.jit
    def value_and_gradients(floats, ids, cotangent):
        value, pull_back = jax.vjp(lambda *floats: expert_parallel.fused_swiglu(*floats, ids, mesh=over_ranks.mesh), *floats)
        return value, *pull_back(cotangent)

    compiled = value_and_gradients.lower(floats, ids, cotangent).compile()
    collectives = set(re.findall(r" (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)\(", compiled.as_text()))
    assert collectives == {"all-to-all"}
    parts = [(8, HIDDEN_SIZE), (8, HIDDEN_SIZE), (3, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE), (3, HIDDEN_SIZE, INTERMEDIATE_SIZE)]
    for array, part in zip(compiled(floats, ids, cotangent), [*parts, (8, TOP_K)], strict=True):
        assert [shard.data.shape for shard in array.addressable_shards] == 4 * [part]


def test_bad_meshes_and_indivisible_experts_are_named():
    arrays, ids, _ = inputs()
    call = [jnp.asarray(array.numpy()) for array in (*arrays, ids)]
    with pytest.raises(TypeError, match=r"^mesh must be a jax.sharding.Mesh, got NoneType"):
        expert_parallel.fused_swiglu(*call, mesh=None)
    with pytest.raises(ValueError, match=r'^mesh must have the one axis "ranks", got \(\'experts\',\)'):
        expert_parallel.fused_swiglu(*call, mesh=jax.make_mesh((4,), ("experts",)))
    call[1], call[2] = call[1][:10], call[2][:10]
    with pytest.raises(ValueError, match=r"^num_experts must be a multiple of the ranks \(4\), got 10"):
        expert_parallel.fused_swiglu(*call[:4], call[4] % 10, mesh=mesh_of(4))
    with pytest.raises(ValueError, match=r"^topk_ids must be in 0..9, got"):
        expert_parallel.fused_swiglu(*call, mesh=mesh_of(2))


WAYS = {
    "slices": sharded_experts.fused_swiglu_tensor_parallel,
    "all tokens": sharded_experts.fused_swiglu_replicated_tokens,
    "gathered": sharded_experts.fused_swiglu_gathered_tokens,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_other_ways_to_spread_experts_are_the_reference_for_traced_ids(way):
    assert_right_for_every_routing(partial(WAYS[way], mesh=mesh_of(4)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("num_ranks", "num_tokens"), [(1, 3), (2, 33), (4, 0)])
def test_the_other_ways_to_spread_experts_are_the_reference(way, num_ranks, num_tokens):
    arrays, ids, cotangent = inputs(num_tokens)
    expected = value_and_grads(lambda *floats: experts.fused_swiglu(*floats, ids), arrays, cotangent)
    actual = jax_value_and_grads(lambda *floats: WAYS[way](*floats, to_jax(ids), mesh=mesh_of(num_ranks)), arrays, cotangent)
    assert_all_equal_to_rounding(actual, expected)


@pytest.mark.parametrize(
    ("way", "wanted"),
    [("slices", {"all-reduce"}), ("all tokens", {"all-reduce"}), ("gathered", {"all-gather", "reduce-scatter"})],
)
def test_sums_are_added_up_over_the_ranks_in_float32(way, wanted):
    arrays, ids, cotangent = (to_jax(each) for each in inputs(num_tokens=32))
    hidden_states, w13, w2, topk_weights = (array.astype(jnp.bfloat16) for array in arrays)
    call = (hidden_states, w13, w2, topk_weights.astype(jnp.float32))

    @jax.jit
    def gradients(*floats):
        return jax.vjp(lambda *floats: WAYS[way](*floats, ids, mesh=mesh_of(4)), *floats)[1](cotangent.astype(jnp.bfloat16))

    text = gradients.lower(*call).compile().as_text()
    sums = re.findall(r"= \(?(\w+)\[[^=]* (all-reduce|reduce-scatter|all-to-all|all-gather)\(", text)
    assert wanted <= {name for _, name in sums}
    assert {dtype for dtype, name in sums if name in ("all-reduce", "reduce-scatter")} == {"f32"}


@pytest.mark.parametrize(
    ("way", "message"),
    [("slices", "intermediate_size must be"), ("all tokens", "num_experts must be"), ("gathered", "num_experts must be")],
)
def test_what_the_ranks_do_not_divide_is_named(way, message):
    arrays, ids, _ = inputs()
    call = [jnp.asarray(array.numpy()) for array in (*arrays, ids)]
    call[1], call[2] = (call[1][:, 2:], call[2][..., 1:]) if way == "slices" else (call[1][:10], call[2][:10])
    with pytest.raises(ValueError, match=rf"^{message} a multiple of the ranks \(4\), got"):
        WAYS[way](*call[:4], call[4] % 10, mesh=mesh_of(4))


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(tp_size=2, dp_size=2),
        ParallelLayout(ep_size=4),
        ParallelLayout(tp_size=2, dp_size=2, ep_size=4),
        ParallelLayout(tp_size=2, dp_size=2, ep_size=2, expert_tp_size=2),
    ],
)
def test_the_mesh_of_a_layout_puts_experts_where_it_says(layout):
    mesh = mesh_of_layout(layout, jax.devices()[:4])
    held = NamedSharding(mesh, PartitionSpec(layout.expert_axes)).devices_indices_map((8,))
    for rank, device in enumerate(jax.devices()[:4]):
        assert held[device][0].indices(8) == layout.experts_of(rank, 8).indices(8)
    with pytest.raises(ValueError, match=r"^layout takes 4 devices, got 3"):
        mesh_of_layout(layout, jax.devices()[:3])


MODEL = DiTConfig(
    input_size=4,
    in_channels=3,
    hidden_size=16,
    depth=1,
    num_heads=2,
    num_classes=5,
    learn_sigma=False,
    frequency_embedding_size=8,
)
CONFIG = ImageDiffusionConfig(
    MODEL, seed=3, learning_rate=0.01, weight_decay=0.1, max_gradient_norm=0.1, label_dropout=0.3, accumulation_steps=2
)
BATCH_SIZE = 6


def state_and_batch() -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Return a state in float64, in which nothing is zero, and images, labels and example_ids."""
    state = {
        name: value if name == "step" else value.double() + 0.1 * random(*value.shape, seed=seed).abs()
        for seed, (name, value) in enumerate(trainer.initial_state(CONFIG).items())
    }
    images = random(BATCH_SIZE, 3, 4, 4, seed=1000)
    return state, [images, torch.arange(BATCH_SIZE) % 5, torch.arange(BATCH_SIZE) * 1000]


def assert_same_step(actual, expected) -> None:
    """Compare states and metrics; each part of a state as one long vector."""
    (actual_state, actual_metrics), (expected_state, expected_metrics) = actual, expected
    assert actual_state.keys() == expected_state.keys()
    assert int(actual_state["step"]) == int(expected_state["step"])
    for part in {name.partition(".")[0] + "." for name in expected_state} - {"step."}:
        names = [name for name in expected_state if name.startswith(part)]
        vectors = [np.concatenate([np.ravel(state[name]) for name in names]) for state in (actual_state, expected_state)]
        if part == "num_updates.":
            assert np.array_equal(*vectors)
        else:
            assert_equal_to_rounding(*vectors)
    for name, expected_metric in vars(expected_metrics).items():
        assert_equal_to_rounding(getattr(actual_metrics, name), expected_metric)


def test_batches_of_any_size_are_trained_on_four_ranks_by_one_compilation():
    state, batch = state_and_batch()
    mesh = mesh_of(4)
    jax_state = training.shard_state(to_jax(state), mesh)
    compilations = training.sharded_step._cache_size()
    for batch_size in (6, 5, 6):  # padded to the same size
        expected = trainer.train_step(state, *(each[:batch_size] for each in batch), config=CONFIG)
        actual = sharded.train_step(jax_state, *to_jax([each[:batch_size] for each in batch]), config=CONFIG, mesh=mesh)
        assert_same_step(actual, expected)
        (state, _), (jax_state, _) = expected, actual
    assert training.sharded_step._cache_size() == compilations + 1


def test_each_rank_holds_a_part_of_the_state_and_the_next_step_copies_none():
    state, batch = state_and_batch()
    state, _ = sharded.train_step(to_jax(state), *to_jax(batch), config=CONFIG, mesh=mesh_of(4))
    parts = {name: array.addressable_shards[0].data.shape for name, array in state.items()}
    assert parts["model.blocks.0.attn.qkv.weight"] == parts["exp_avg.blocks.0.attn.qkv.weight"] == (12, 16)
    assert parts["exp_avg_sq.blocks.0.mlp.fc2.weight"] == (16, 16)  # of (16, 64)
    assert parts["model.y_embedder.embedding_table.weight"] == (6, 4)  # 4 do not divide the 5 classes and the dropped label
    again = training.shard_state(state, mesh_of(4))
    assert all(again[name] is array for name, array in state.items())


def test_parameters_are_gathered_and_each_rank_has_its_part_of_the_batch():
    state, batch = state_and_batch()
    mesh = mesh_of_ranks(mesh_of(4))
    images, labels, ids, counts = (jnp.resize(each, (8, *each.shape[1:])) for each in (*to_jax(batch), jnp.ones(8, bool)))
    of_batch = (images, labels, None, None, ids), counts
    placed = jax.device_put(of_batch, NamedSharding(mesh, PartitionSpec("ranks")))
    of_trainer = {"shares": sharded.shares, "config": CONFIG, "mesh": mesh}
    lowered = training.sharded_step.lower(training.shard_state(to_jax(state), mesh), *placed, **of_trainer)
    text = lowered.compile().as_text()
    assert " all-gather(" in text and "f64[16,16]{1,0} all-gather(" in text
    assert any(" all-reduce(" in line and "transpose(jvp())" in line for line in text.splitlines())


@pytest.mark.parametrize("bad", ["loss", "gradient of final_layer.linear.weight"])
def test_what_is_not_finite_is_named(bad):
    state, batch = state_and_batch()
    if bad == "loss":
        batch[0][5] = torch.nan
    else:  # a finite result from tiny weights and huge features
        state["model.final_layer.linear.weight"] *= 1e-60
        state["model.final_layer.adaLN_modulation.1.bias"][:] = 1e200
    message = f"^step 0: {bad} is not finite"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train_step(state, *batch, config=CONFIG)
    with pytest.raises(FloatingPointError, match=message):
        sharded.train_step(to_jax(state), *to_jax(batch), config=CONFIG, mesh=mesh_of(4))
