"""MoE layers whose experts have biases: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="biased_moe_layers"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="biased_moe_layers"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="biased_moe_layers"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="biased_moe_layers"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
