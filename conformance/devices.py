"""What the machine offers, and how the process must be set up before kernels are imported."""

import os
from pathlib import Path


def interpret_without_gpu() -> None:
    """Has Triton interpret its kernels where there is no GPU; must run before triton is imported.

    `TRITON_INTERPRET=0` in the environment is left alone.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def cache_compilations() -> None:
    """Has JAX keep what it compiles, which takes a quarter of a second for every new shape; must run before jax is imported."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gaugeblock" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def available_devices() -> tuple[str, ...]:
    """Devices of this machine that subjects can run on."""
    import torch

    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run in the interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
