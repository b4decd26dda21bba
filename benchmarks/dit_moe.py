"""DiT-MoE: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="dit_moe"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="dit_moe"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="dit_moe"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="dit_moe"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
