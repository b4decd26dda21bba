"""Dispatch: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="dispatch"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="dispatch"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="dispatch"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="dispatch"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
