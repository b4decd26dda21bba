"""Routers with a capacity: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="capacity_routers"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="capacity_routers"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="capacity_routers"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="capacity_routers"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
