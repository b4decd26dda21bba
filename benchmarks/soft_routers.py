"""Routers that balance by softmaxes over tokens: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="soft_routers"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="soft_routers"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="soft_routers"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="soft_routers"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
