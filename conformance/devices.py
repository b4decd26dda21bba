"""What the machine offers, and how the process must be set up before kernels are imported."""

import os


def interpret_without_gpu() -> None:
    """Has Triton interpret its kernels where there is no GPU; must run before triton is imported.

    `TRITON_INTERPRET=0` in the environment is left alone.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def available_devices() -> tuple[str, ...]:
    """Devices of this machine that subjects can run on."""
    import torch

    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run in the interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
