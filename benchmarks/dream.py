"""Dream: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="dream"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="dream"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="dream"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="dream"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
