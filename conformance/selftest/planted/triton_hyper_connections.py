"""Bugs in the text of our kernels of hyper-connections."""

from gaugeblock.conformance.selftest.edits import mutant

CONNECTION = "hyper_connections.hyper_connection"
FORWARD, BACKWARD = "hyper_connections._forward_kernel", "hyper_connections._backward_kernel"

mutant(
    CONNECTION, "stream-stride-ignored", "Streams, which begin as one that is repeated, are taken to lie one behind the other.",
    "hyper_connections._load_streams", "stride_k + columns", "stride_d * 64 + columns", "parity", "memory",
)  # fmt: skip
mutant(
    CONNECTION, "largest-of-the-row", "Before the exponential the largest of a row is subtracted: it does not cancel.", FORWARD,
    "scores - largest[:, None, :]", "scores - largest[:, :, None]", "parity", "boundary",
)  # fmt: skip
mutant(
    CONNECTION, "shares-of-no-stream", "Lanes behind the last stream take part in the sums.", FORWARD,
    "tl.where(is_share, tl.exp(scores - largest[:, None, :]), 0.0)", "tl.exp(scores - largest[:, None, :])", "parity", "boundary",
)  # fmt: skip
mutant(
    CONNECTION, "mixed-by-columns", "The gradient of a share is that of its mirror image.", BACKWARD,
    "tl.where(targets == t, of_share_t[:, :, None], gradients)",
    "tl.where(streams[None, :, None] == t, of_share_t[:, None, :], gradients)", "gradients", "gradient",
)  # fmt: skip
mutant(
    CONNECTION, "rounds-forward-again", "Backward goes through the rounds from first to last.", BACKWARD,
    "2 * (ROUNDS - 1 - index)", "2 * index", "gradients", "gradient",
)  # fmt: skip
mutant(
    CONNECTION, "rounds-left-out", "The gradient of a division is that of its numerator.", BACKWARD,
    "(gradients - inner[:, :, None])", "gradients", "gradients", "gradient",
)  # fmt: skip
mutant(
    CONNECTION, "projection-left-out", "The gradient along the normalized stream stays.", BACKWARD,
    "of_normalized - normalized * projection[:, :, None]", "of_normalized", "gradients", "gradient",
)  # fmt: skip
mutant(
    CONNECTION, "mixed-gradient-left-out", "Streams get the gradient of what was read alone.", BACKWARD,
    "of_x += share[:, :, None] * mixed_gradient", "of_x += 0.0 * mixed_gradient", "gradients", "gradient",
)  # fmt: skip
