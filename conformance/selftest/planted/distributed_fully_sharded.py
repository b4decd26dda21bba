"""Bugs of our models of which each rank has a part of every parameter, and of the batch."""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

DIT, DIT_MOE, VAE, CLIP = "dit.dit", "dit_moe.dit_moe", "vae.encode", "clip_text.clip_text"
SHARDED: dict[str, Any] = {
    "implementation": "fsdp2", "world_sizes": (1, 2), "rounding": "strict", "batch_invariant": False, "sharding": "data_parallel",
}  # fmt: skip

mutant(
    DIT, "gradients-averaged", "Gradients of parameters are averaged over the ranks, as FSDP does by itself.",
    "fully_sharded._WholeState", "ranks * each", "each", "world_size", "gradient",
    "fully_shard's division by the world size", **SHARDED,
)  # fmt: skip
mutant(
    DIT, "latents-once-a-rank", "What undoes FSDP's average is left in the gradients of latents, which nothing averages.",
    "fully_sharded._WholeState", "each.grad / ranks", "each.grad", "world_size", "gradient", **SHARDED,
)  # fmt: skip
mutant(
    DIT, "first-block-everywhere", "Every block runs with the first one's parameters.", "fully_sharded.FullyShardedModel",
    "owner(run_block", "next(iter(self.blocks_of_parts.values()))(run_block", "parity", "structural", **SHARDED,
)  # fmt: skip
mutant(
    DIT_MOE, "loss-of-own-examples", "The auxiliary loss is that of the rank's own examples.",
    "fully_sharded_models._predict_dit_moe", '| {"balance_loss": loss}', '| {"balance_loss": OF_MOE.balance_loss}', "world_size",
    "structural", "an auxiliary loss under data parallelism", **SHARDED,
)  # fmt: skip
mutant(
    DIT_MOE, "loss-once-a-rank", "Each rank's mean of the loss counts as a whole one.", "auxiliary_losses.balance_loss",
    "(total / num_samples.clamp(min=1))", "total", "world_size", "structural", **SHARDED,
)  # fmt: skip
mutant(
    VAE, "gradients-of-the-mean", "Only the first result's gradient goes back.", "fully_sharded._WholeState",
    "torch.autograd.backward(outputs, [ranks * each for each in d_outputs])",
    "torch.autograd.backward(outputs[:1], [ranks * d_outputs[0]])", "gradients", "gradient", **SHARDED,
)  # fmt: skip
mutant(
    CLIP, "last-parts-cut", "What the last rank has padded its part with is taken for its rows.",
    "fully_sharded._gather_of_one_dtype", "rows[: len(local)] = local", "rows[rows.shape[0] - len(local) :] = local",
    "world_size", "gradient", "all_gather of uneven shards", **SHARDED,
)  # fmt: skip
mutant(
    DIT, "rounded-before-the-sum", "Each rank's gradients are rounded before they are added up.", "fully_sharded._WholeState",
    "dtype = torch.promote_types(torch.float32, tensors[-1].dtype)", "dtype = tensors[-1].dtype", "gradients", "precision",
    "fully_shard with reduce_dtype bfloat16", **SHARDED, dtypes=("bfloat16",),
)  # fmt: skip
