"""Bugs of our trainers in JAX over ranks."""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

CLASSES, EXPERTS = "train_image_diffusion.train_step", "train_image_diffusion.train_step_of_experts"
CYCLES = "train_cycle_vae.train_step"
SHARDED: dict[str, Any] = {"implementation": "jax-sharded", "batch_invariant": False}

mutant(
    CLASSES, "padding-is-learned", "Examples of zeros that fill up the ranks count in the loss.", "train_image_diffusion.shares",
    "jnp.where(counts, losses_B, 0).sum()", "losses_B.sum()", "parity", "boundary", "drop_last=False with a padded batch",
    **SHARDED,
)  # fmt: skip
mutant(
    CLASSES, "mean-over-padding", "The loss is divided by the examples and those that fill up the ranks.",
    "training.sharded_step", "batch_size=counts.sum()", "batch_size=len(counts)", "parity", "boundary", **SHARDED,
)  # fmt: skip
mutant(
    EXPERTS, "balance-not-learned", "The balance is reported and not differentiated.", "train_image_diffusion.shares",
    "loss + auxiliary_loss, {", "loss, {", "parity", "gradient", **SHARDED, sharding="without_padding",
)  # fmt: skip
mutant(
    CYCLES, "padding-of-ranks-is-learned", "Examples of zeros that fill up the ranks count in each loss.",
    "train_cycle_vae.Shares", "jnp.where(counts, each, 0).sum()", "each.sum()", "parity", "boundary",
    "drop_last=False with a padded batch", **SHARDED,
)  # fmt: skip
mutant(
    CYCLES, "weights-where-the-state-was", "The weights of the cycles lie on one device, where the other metrics lie on all.",
    "train_cycle_vae.train_step", "jax.device_put(weights, everywhere)", "weights", "resume", "structural", **SHARDED,
)  # fmt: skip
