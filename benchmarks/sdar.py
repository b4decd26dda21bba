"""SDAR: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="sdar"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="sdar"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="sdar"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="sdar"):
    """Distinct bit patterns over several runs of one input: 1 is right."""


class Decoding(history.Decoding, family="sdar"):
    """Seconds and passes of a block by each strategy, after a prompt."""
