"""Layers of diffusion transformers: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="layers"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="layers"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="layers"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="layers"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
