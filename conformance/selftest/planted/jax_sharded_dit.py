"""Bugs of our DiT and DiT-MoE in JAX over ranks."""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

DIT, DIT_MOE = "dit.dit", "dit_moe.dit_moe"
DIT_ROW: dict[str, Any] = {"implementation": "jax-sharded", "only": "num_heads % 4 == 0"}
MOE_ROW: dict[str, Any] = {"implementation": "jax-sharded", "only": "num_heads % 4 == 0 and num_experts % 4 == 0"}

mutant(
    DIT, "matrices-in-turns", "Rows of queries, keys and values are taken in turns.", "sharded_models.shard_state",
    "parameter.reshape(*shape[:axis], cut.blocks, shape[axis] // cut.blocks, *shape[axis + 1 :])",
    "parameter.reshape(*shape[:axis], shape[axis] // cut.blocks, cut.blocks, *shape[axis + 1 :]).swapaxes(axis, axis + 1)",
    "world_size", "structural", "reshapes of a fused qkv", **DIT_ROW,
)  # fmt: skip
mutant(
    DIT, "bias-once-for-all", "Queries, keys and values add the bias of the queries.", "sharded_dit._attention",
    'block["attn.qkv.bias"][:, None, None]', 'block["attn.qkv.bias"][:1, None, None]', "parity", "structural", **DIT_ROW,
)  # fmt: skip
mutant(
    DIT, "eps-of-the-first-norm", "The second norm has the eps of the first.", "sharded_dit._model",
    "eps=config.norm_eps", "eps=NORM_EPS", "parity", "precision", **DIT_ROW,
)  # fmt: skip
mutant(
    DIT_MOE, "mean-of-ranks", "The ranks' sums are averaged.", "sharded_experts._summed", "jax.lax.psum(", "jax.lax.pmean(",
    "world_size", "structural", "jax.lax.pmean for psum", **MOE_ROW,
)  # fmt: skip
mutant(
    DIT_MOE, "experts-of-the-first-rank", "Every rank takes its experts for the first ones.", "sharded_experts._summed",
    'jax.lax.axis_index("ranks") *', '0 * jax.lax.axis_index("ranks") *', "world_size", "structural", **MOE_ROW,
)  # fmt: skip
mutant(
    DIT_MOE, "one-norm-for-both", "Keys pass the norm of the queries.", "sharded_dit._attention",
    '"attn.k_norm", key_BASF', '"attn.q_norm", key_BASF', "parity", "structural", **MOE_ROW,
)  # fmt: skip
mutant(
    DIT_MOE, "times-not-scaled", "Times are embedded as they come.", "sharded_dit.dit_moe_of_placed",
    " * config.timestep_scale", "", "parity", "structural", **MOE_ROW,
)  # fmt: skip
mutant(
    DIT_MOE, "loss-without-gradient", "The losses are reported, and nothing flows back.", "sharded_dit._model",
    "total + loss", "total + jax.lax.stop_gradient(loss)", "gradients", "gradient", **MOE_ROW,
)  # fmt: skip
