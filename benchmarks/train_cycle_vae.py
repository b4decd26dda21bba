"""The training step of text-latent diffusion with cycles: the questions of gaugeblock.conformance.bench.history."""

from gaugeblock.conformance.bench import history


class Cost(history.Cost, family="train_cycle_vae"):
    """Time over roofline time and peak memory, at published sizes."""


class Counters(history.Counters, family="train_cycle_vae"):
    """Bytes allocated, operations dispatched, kernels launched."""


class Accuracy(history.Accuracy, family="train_cycle_vae"):
    """rms and bias of the errors, in units of their limits."""


class Determinism(history.Determinism, family="train_cycle_vae"):
    """Distinct bit patterns over several runs of one input: 1 is right."""
