"""Hyper-connections: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="hyper_connections"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="hyper_connections"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="hyper_connections"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="hyper_connections"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
