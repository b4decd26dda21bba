"""Bugs of our trainers of which each rank has a part of every parameter, and of the batch."""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

CLASSES, TEXTS, EXPERTS = (f"train_image_diffusion.train_step{of}" for of in ("", "_on_texts", "_of_experts"))
SHARDED: dict[str, Any] = {"implementation": "fsdp2", "batch_invariant": False, "world_sizes": (1, 2)}
OF_RANK = "weight * (value / self.run.mesh.size() + auxiliary_loss - value)"

mutant(
    CLASSES, "shares-averaged", "Gradients of shares of the mean are averaged over the ranks, as FSDP does by itself.",
    "training.ShardedRun", "self.mesh.size() * self.config.loss_scale", "self.config.loss_scale", "world_size", "gradient",
    "fully_shard's division by the world size", **SHARDED,
)  # fmt: skip
mutant(
    CLASSES, "mean-of-the-ranks-means", "Each rank's mean weighs as much, however many examples it has.",
    "train_image_diffusion.ShardedTrainer", "losses_B.sum() / sum(batch_sizes)",
    "losses_B.sum() / max(1, len(images)) / self.run.mesh.size()", "world_size", "structural",
    "transformers' 2024 fix: num_items_in_batch", **SHARDED,
)  # fmt: skip
mutant(
    CLASSES, "norm-of-own-parts", "Gradients are clipped by the norm of what this rank holds of them.", "training.ShardedRun",
    "gradient_norm = square.squeeze().sqrt()",
    "gradient_norm = torch.stack([each.square().sum() for each in gradients.values()]).sum().sqrt()", "world_size", "structural",
    "clip_grad_norm_ on local shards", **SHARDED,
)  # fmt: skip
mutant(
    TEXTS, "first-microbatch-exchanged", "Gradients are exchanged after the first microbatch, and no more.",
    "training.ShardedRun", "index == num_microbatches - 1", "index == 0", "parity", "gradient",
    "no_sync left on after the first microbatch", **SHARDED,
)  # fmt: skip
mutant(
    TEXTS, "average-one-update-behind", "The average counts the updates before this one.", "training.ShardedRun",
    'local["model"], int(self.updates)', 'local["model"], int(self.updates) - 1', "parity", "boundary",
    "EMAModel.step before or after the count", **SHARDED,
)  # fmt: skip
mutant(
    EXPERTS, "scale-left-in-gradients", "Gradients are as many times too large as the loss was scaled.", "training.ShardedRun",
    "local_part(gradient_of(parameters[name])) / self.config.loss_scale", "local_part(gradient_of(parameters[name]))",
    "parity", "gradient", "clipping before unscale_", **SHARDED,
)  # fmt: skip
mutant(
    EXPERTS, "balance-of-own-examples", "The balance is that of the rank's own examples.",
    "fully_sharded_models._predict_dit_moe", '| {"balance_loss": loss}', '| {"balance_loss": OF_MOE.balance_loss}', "world_size",
    "structural", "an auxiliary loss under data parallelism", **SHARDED,
)  # fmt: skip
mutant(
    EXPERTS, "balance-once-a-rank", "Every rank reports the whole balance, and they are added up.",
    "train_image_diffusion.ShardedTrainer", OF_RANK, "weight * auxiliary_loss", "world_size", "structural",
    "an auxiliary loss that all ranks have, summed", **SHARDED,
)  # fmt: skip
mutant(
    EXPERTS, "balance-a-part-of-its-gradient", "What is differentiated of the balance is a rank's part.",
    "train_image_diffusion.ShardedTrainer", OF_RANK, "weight * auxiliary_loss / self.run.mesh.size()", "world_size", "gradient",
    "an auxiliary loss averaged over ranks", **SHARDED,
)  # fmt: skip
mutant(
    EXPERTS, "balance-weighs-as-the-rank", "The balance of all weighs as much as the rank has examples.",
    "train_image_diffusion.ShardedTrainer", "of_microbatches[index] / sum(batch_sizes)", "len(images) / sum(batch_sizes)",
    "world_size", "structural", **SHARDED,
)  # fmt: skip
mutant(
    "train_block_diffusion.train_step", "tokens-of-the-rank", "Losses are divided by the number of tokens of the rank.",
    "train_block_diffusion.ShardedTrainer", "dist.all_reduce(number, group=run.mesh.get_group())", "pass", "world_size",
    "structural", "num_items_in_batch of a rank", **SHARDED | {"rounding": "strict", "sharding": "data_parallel"},
)  # fmt: skip
