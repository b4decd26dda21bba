"""The training step of an upcycled GPT-2: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="train_moe_lm"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="train_moe_lm"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="train_moe_lm"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="train_moe_lm"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
