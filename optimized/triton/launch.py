"""What every launcher shares: where a tensor may lie, the device to launch on, and 64-bit rows."""

from contextlib import AbstractContextManager, suppress

import torch
import triton
import triton.language as tl

# Triton decides by the same variable when it decorates a kernel, so it is read once, on import.
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def program_rows(BLOCK_ROWS: tl.constexpr):
    """Return the rows of this program, int64: a row times its stride may pass 2^31."""
    return tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)


@triton.jit
def program_columns(BLOCK_COLUMNS: tl.constexpr):
    """Return the columns of this program along the second axis of the grid, [1, BLOCK_COLUMNS] int64."""
    return tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]


def require_triton_device(tensor_name: str, tensor: torch.Tensor) -> None:
    """Raise unless a Triton kernel can work on `tensor`.

    It can on the device of Triton's active driver (a GPU; the CPU for a driver that only compiles) and, under
    the interpreter, on the CPU.

    Raises:
        ValueError: `tensor` lies elsewhere, or there is neither a GPU nor the interpreter.
    """
    device_types = {"cpu"} if INTERPRETED else set()
    with suppress(RuntimeError):  # no active driver: this machine has no GPU
        device_types.add(triton.runtime.driver.active.get_active_torch_device().type)
    if tensor.device.type not in device_types:
        expected = " or ".join(sorted(device_types)) or "a GPU, and Triton finds none"
        advice = "" if INTERPRETED else "; TRITON_INTERPRET=1, set before the import, runs kernels on the CPU"
        raise ValueError(f"{tensor_name} must be on {expected}, got {tensor.device}{advice}")


def will_differentiate(*tensors: torch.Tensor | None) -> bool:
    """Return whether autograd may ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


def reject_float64(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError for a tensor of the one floating dtype that kernels do not take."""
    if tensor.dtype == torch.float64:
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got float64")


def on_amd() -> bool:
    """Return whether kernels are launched on a GPU of AMD; those that are interpreted are NVIDIA's."""
    return not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "hip"


def multiplies_e4m3() -> bool:
    """Return whether matrix units take float8_e4m3fn: NVIDIA's from sm_89 on, and not those of kernels that are interpreted."""
    return not INTERPRETED and _is_nvidia_from(89)


def has_tensor_descriptors() -> bool:
    """Return whether the chip reads tiles by descriptors: NVIDIA's from sm_90 on; kernels that are interpreted do."""
    return INTERPRETED or _is_nvidia_from(90)


def _is_nvidia_from(architecture: int) -> bool:
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and int(target.arch) >= architecture


def multiprocessors_of(tensor: torch.Tensor) -> int:
    """Return how many the device of `tensor` has; interpreted, or only compiled, two: small cases have many tiles for each."""
    if tensor.device.type == "cpu":
        return 2
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Make the device of `tensor` the current one, where Triton launches; nothing to do on the CPU."""
    return torch.cuda.device_of(tensor)
