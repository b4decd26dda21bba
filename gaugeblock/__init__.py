"""Reference implementations and a conformance gate for Mixture-of-Experts and diffusion kernels."""

__version__ = "0.1.0"
