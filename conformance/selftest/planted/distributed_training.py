"""Bugs of training steps of which each rank has a part of the batch."""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

SHARDED: dict[str, Any] = {
    "implementation": "fsdp2", "world_sizes": (2,), "rounding": "strict", "batch_invariant": False, "sharding": "data_parallel",
}  # fmt: skip

mutant(
    "train_block_diffusion.train_step", "tokens-of-the-rank", "Losses are divided by the number of tokens of the rank.",
    "train_block_diffusion.ShardedTrainer", "dist.all_reduce(number, group=run.mesh.get_group())", "pass", "world_size",
    "structural", "num_items_in_batch of a rank", **SHARDED,
)  # fmt: skip
