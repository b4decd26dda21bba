"""The text-latent MMDiT: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="text_latent_mmdit"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="text_latent_mmdit"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="text_latent_mmdit"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="text_latent_mmdit"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
