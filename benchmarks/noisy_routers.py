"""Routers that choose by noisy logits: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="noisy_routers"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="noisy_routers"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="noisy_routers"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="noisy_routers"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
