"""What Triton asks a GPU's driver, answered where there is no GPU."""

from collections.abc import Callable
from typing import Any

from gaugeblock.conformance.engine.triton.chips import Chip


def driver_of(chip: Chip) -> Any:
    """A driver of a device that kernels can be compiled for, but that is not there; its tensors are the CPU's."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class AbsentDevice(DriverBase):
        """See `driver_of`."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(chip.backend, chip.architecture, chip.warp_size)

        def get_current_device(self) -> str:
            return chip.name  # the key of a kernel's caches, so that chips do not share them

        def set_current_device(self, device: Any) -> None:
            pass

        def get_current_stream(self, device: Any) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_device_interface(self) -> Any:
            return torch.cpu

        def map_python_to_cpp_type(self, ty: str) -> str:
            return "int"

        def get_benchmarker(self) -> Callable:
            def call_once(call: Callable, quantiles: tuple, **_: Any) -> list[float]:
                call()
                return [1.0] * len(quantiles)

            return call_once

        def get_empty_cache_for_benchmark(self) -> torch.Tensor:
            return torch.empty(0)

        def clear_cache(self, cache: Any) -> None:
            pass

    return AbsentDevice()
