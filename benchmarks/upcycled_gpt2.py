"""The upcycled GPT-2: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="upcycled_gpt2"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="upcycled_gpt2"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="upcycled_gpt2"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="upcycled_gpt2"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
