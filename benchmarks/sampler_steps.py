"""Steps of samplers: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="sampler_steps"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="sampler_steps"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="sampler_steps"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="sampler_steps"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
