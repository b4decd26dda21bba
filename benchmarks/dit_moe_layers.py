"""The MoE layer of DiT-MoE: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="dit_moe_layers"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="dit_moe_layers"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="dit_moe_layers"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="dit_moe_layers"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
