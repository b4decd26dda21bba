"""The versions for many processes: what the conformance suite does not ask of every implementation."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

from typing import Any

import pytest
import torch
import torch.distributed as dist
from on_four_ranks import (
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_EXPERTS,
    RANKS,
    TOKENS,
    TOP_K,
    assert_equal_to_rounding,
    draw,
    four_ranks,
    mesh_of,
    out_and_gradients,
)

from gaugeblock.optimized.distributed import experts, triton_grouped_matmul
from gaugeblock.optimized.distributed.train_image_diffusion import ShardedTrainer
from gaugeblock.reference.configs import DiTConfig, ImageDiffusionConfig
from gaugeblock.reference.torch import experts as reference
from gaugeblock.reference.torch import train_image_diffusion as reference_trainer

on_ranks = pytest.fixture(scope="module")(four_ranks)


def expert_arguments(num_tokens: int, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return (hidden_states, w13, w2, topk_weights) and topk_ids that leave an expert empty."""
    shapes = (
        (num_tokens, HIDDEN_SIZE),
        (NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE),
        (NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE),
        (num_tokens, TOP_K),
    )
    ids = torch.randint(1, NUM_EXPERTS, (num_tokens, TOP_K), generator=torch.Generator().manual_seed(4))
    return [draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)], ids


def check_experts(ranks: int) -> None:
    mesh, sizes = mesh_of(ranks), TOKENS[ranks]
    floats, ids = expert_arguments(sum(sizes))
    cotangent = draw(sum(sizes), HIDDEN_SIZE, seed=5)
    expected = out_and_gradients(lambda *floats: reference.fused_swiglu(*floats, ids), floats, cotangent)

    def mine(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.split(sizes)[mesh.get_local_rank()]

    def my_experts(weights: torch.Tensor) -> torch.Tensor:
        return weights.chunk(ranks)[mesh.get_local_rank()]

    shard = [mine(floats[0]), my_experts(floats[1]), my_experts(floats[2]), mine(floats[3])]
    actual = out_and_gradients(lambda *floats: experts.fused_swiglu(*floats, mine(ids), mesh=mesh), shard, mine(cotangent))
    cut = (mine, mine, my_experts, my_experts, mine)
    for one_actual, one_expected, of_rank in zip(actual, expected, cut, strict=True):
        assert_equal_to_rounding(one_actual, of_rank(one_expected))


def test_experts_on_two_times_two_ranks_are_those_on_one(on_ranks):
    """What the gate does not ask for: other ranks hold the same experts."""
    assert on_ranks(check_experts, 2) == [None] * RANKS


def count_exchanges() -> list[int]:
    """Return how many exchanges a rank makes forward, and backward."""
    mesh, exchange, counts = mesh_of(RANKS), dist.all_to_all_single, [0, 0]

    def counted(*arguments: Any, **options: Any) -> Any:
        counts[direction] += 1
        return exchange(*arguments, **options)

    floats, ids = expert_arguments(TOKENS[RANKS][mesh.get_local_rank()])
    hidden_states, w13, w2, topk_weights = (tensor.requires_grad_() for tensor in floats)
    w13, w2 = (weights.chunk(RANKS)[mesh.get_local_rank()] for weights in (w13, w2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted)
        direction = 0
        out = experts.fused_swiglu(hidden_states, w13, w2, topk_weights, ids, mesh=mesh)
        direction = 1
        out.sum().backward()
    return counts


def test_a_rank_without_tokens_takes_part_in_every_exchange(on_ranks):
    """Forward: what ranks tell each other, ids, rows, rows back; backward: rows, their weights, rows back."""
    assert 0 in TOKENS[RANKS]
    assert on_ranks(count_exchanges) == [[4, 3]] * RANKS


def call_experts(change: str) -> str:
    """Make a call that is bad on rank 2 alone, then a good one; return what the first raised."""
    mesh = mesh_of(RANKS)
    (hidden_states, w13, w2, topk_weights), topk_ids = expert_arguments(2, torch.float32)
    good = {
        "hidden_states": hidden_states,
        "w13": w13.chunk(RANKS)[mesh.get_local_rank()],
        "w2": w2.chunk(RANKS)[mesh.get_local_rank()],
        "topk_weights": topk_weights,
        "topk_ids": topk_ids,
    }
    changes = {
        "an id out of range": {"topk_ids": topk_ids + NUM_EXPERTS},
        "no tensor": {"hidden_states": None},
        "another dtype": {name: good[name].half() for name in ("hidden_states", "w13", "w2")},
        "another width": {"hidden_states": hidden_states[:, 1:], "w13": good["w13"][:, :, 1:], "w2": good["w2"][:, 1:]},
        "fewer experts": {"w13": good["w13"][1:], "w2": good["w2"][1:], "topk_ids": topk_ids * 0},
        "a gradient": {"w2": good["w2"].clone().requires_grad_()},
    }
    bad = good | changes[change] if mesh.get_local_rank() == 2 else good
    try:
        experts.fused_swiglu(**bad, mesh=mesh)
    except (TypeError, ValueError) as error:
        experts.fused_swiglu(**good, mesh=mesh)
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


@pytest.mark.parametrize(
    ("change", "there", "elsewhere"),
    [
        (
            "an id out of range",
            "ValueError: topk_ids must be in 0..7, got",
            "ValueError: topk_ids must be in 0..7, got 9..15 (on rank 2)",
        ),
        (
            "no tensor",
            "TypeError: hidden_states must be an array, got NoneType",
            "ValueError: hidden_states must be an array, got NoneType (on rank 2)",
        ),
        ("another dtype", *["ValueError: hidden_states must have the same dtype on every rank, got"] * 2),
        ("another width", *["ValueError: hidden_states must have the same hidden_size on every rank, got [12, 12, 11, 12]"] * 2),
        ("fewer experts", *["ValueError: w13 must hold the same number of experts (num_experts / world_size) on"] * 2),
        ("a gradient", *["ValueError: w2 must require a gradient alike on every rank, got [0, 0, 1, 0]"] * 2),
    ],
)
def test_a_bad_call_on_one_rank_raises_on_all_and_the_next_call_works(on_ranks, change, there, elsewhere):
    for rank, message in enumerate(on_ranks(call_experts, change)):
        assert message.startswith(there if rank == 2 else elsewhere), message


MODEL = DiTConfig(
    input_size=4,
    patch_size=2,
    in_channels=1,
    hidden_size=8,
    depth=2,
    num_heads=2,
    num_classes=3,
    learn_sigma=False,
    frequency_embedding_size=8,
)
CONFIG = ImageDiffusionConfig(MODEL, accumulation_steps=2, weight_decay=0.1, learning_rate=0.01)


def state_and_batch(num_examples: int) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Return a state in the middle of a run, and (images, labels, example_ids)."""
    state = {
        name: each if name == "step" else (each.double() + draw(*each.shape, seed=seed).abs() / 10)
        for seed, (name, each) in enumerate(reference_trainer.initial_state(CONFIG).items())
    }
    ids = torch.arange(num_examples)
    return state, [draw(num_examples, 1, 4, 4, seed=9), ids % 3, 7 * ids]


def check_trainer() -> None:
    mesh, sizes = mesh_of(RANKS), TOKENS[RANKS]
    expected, batch = state_and_batch(sum(sizes))
    trainer = ShardedTrainer(expected, config=CONFIG, mesh=mesh)
    for _ in range(2):
        expected, expected_metrics = reference_trainer.train_step(expected, *batch, config=CONFIG)
        metrics = trainer.step(*(each.split(sizes)[mesh.get_local_rank()] for each in batch))
        assert_equal_to_rounding(metrics.loss, expected_metrics.loss)
        assert_equal_to_rounding(metrics.gradient_norm, expected_metrics.gradient_norm)

    shards = [part.to_local() for parameter in trainer.run.model.parameters() for part in (parameter, parameter.grad)]
    held = torch.tensor(sum(shard.numel() for shard in shards))
    dist.all_reduce(held, group=mesh.get_group())
    assert held == 2 * sum(parameter.numel() for parameter in trainer.run.model.parameters())  # each number on one rank alone

    actual = trainer.state()
    assert list(actual) == list(expected)
    assert torch.equal(actual.pop("step"), expected.pop("step"))
    for name, tensor in expected.items():
        assert_equal_to_rounding(actual[name], tensor)


def test_the_sharded_trainer_makes_the_steps_of_the_reference_and_holds_a_part(on_ranks):
    assert on_ranks(check_trainer) == [None] * RANKS


def train_badly(change: str) -> str:
    """Make a step that is bad on rank 2 alone; see that it changed nothing; return what it raised."""
    mesh = mesh_of(RANKS)
    state, batch = state_and_batch(RANKS)
    images, labels, example_ids = (each[mesh.get_local_rank()][None] for each in batch)
    changes = {
        "an infinite image": (images * torch.inf, labels, example_ids),
        "a label out of range": (images, labels + 3, example_ids),
        "no labels": (images, None, example_ids),
        "float32 images": (images.float(), labels, example_ids),
    }
    trainer = ShardedTrainer(state, config=CONFIG, mesh=mesh)
    try:
        trainer.step(*(changes[change] if mesh.get_local_rank() == 2 else (images, labels, example_ids)))
    except (TypeError, ValueError, FloatingPointError) as error:
        assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.state().items())
        trainer.step(images, labels, example_ids)
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


@pytest.mark.parametrize(
    ("change", "there", "elsewhere"),
    [
        ("an infinite image", *["FloatingPointError: step 0: loss is not finite"] * 2),
        ("a label out of range", "ValueError: labels must be in 0..2, got 5..5", "ValueError: labels must be in 0..2, got 5..5"),
        ("no labels", "TypeError: labels must be an array, got NoneType", "ValueError: labels must be an array"),
        ("float32 images", "TypeError: images must have the dtype of the state", "ValueError: images must have the dtype of"),
    ],
)
def test_a_bad_step_on_one_rank_raises_on_all_and_changes_nothing(on_ranks, change, there, elsewhere):
    for rank, message in enumerate(on_ranks(train_badly, change)):
        assert message.startswith(there if rank == 2 else elsewhere), message


@pytest.mark.parametrize("sizes", [[5, 0, 17, 1], [0, 0, 0, 0]])
def test_the_triton_products_of_rows_are_those_of_the_reference(sizes):
    sizes_E = torch.tensor(sizes)
    rows, weights, cotangent = (
        draw(*shape, seed=seed, dtype=torch.float32)
        for seed, shape in enumerate([(sum(sizes), 20), (len(sizes), 12, 20), (sum(sizes), 12)])
    )
    expected = out_and_gradients(lambda *floats: reference.grouped_matmul(*floats, sizes_E), [rows, weights], cotangent)
    actual = out_and_gradients(lambda *floats: triton_grouped_matmul.grouped_matmul(*floats, sizes_E), [rows, weights], cotangent)
    for one_actual, one_expected in zip(actual, expected, strict=True):
        assert_equal_to_rounding(one_actual, one_expected)
