"""What the machine offers, and how the process must be set up before kernels are imported."""

import os
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def interpret_without_gpu() -> None:
    """Has Triton interpret its kernels where there is no GPU; must run before triton is imported.

    `TRITON_INTERPRET=0` in the environment is left alone.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


JAX_DEVICES = 4  # that a CPU is split into
MOST_PROCESSES = 16  # on one machine
RANKS = "GAUGEBLOCK_RANKS"  # host:port:size of the store that torchrun's ranks meet at, in the environment of such a run


def set_up_process() -> None:
    """Prepares a process in which subjects are judged; before triton, jax or a candidate is imported."""
    interpret_without_gpu()
    split_cpu_for_jax()
    keep_thread_count()


def keep_thread_count() -> None:
    """Lets torch have as many threads as OMP_NUM_THREADS says, also where those are more than there are cores."""
    import torch

    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        torch.set_num_threads(max(1, int(os.environ["OMP_NUM_THREADS"])))


def split_cpu_for_jax() -> None:
    """Lets JAX take the CPU for several devices, on which sharded functions can be run."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={JAX_DEVICES}".strip()


QUICK_FLAGS = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")
# XLA takes 4.2 CPU seconds for a forward and a backward pass of Sinkhorn's router, of the experts, the DiT and GShard's
# router. Its older code for fused operations saves 2.4 of them (the newer makes MLIR of each, and lowers it); one LLVM module in
# place of up to 32, which would be for idle cores, 0.6 more. Of 465 results of the gate 458 have the same bits (those of erf have
# not); what XLA counts of memory and operations differs.
QUICKER_FLAGS = (*QUICK_FLAGS, "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
KNOWS_QUICKER_FLAGS = "0.10."  # how versions of jaxlib begin that have them: XLA ends a process that names a flag it lacks


def compile_quickly() -> None:
    """Has XLA optimize less, which saves most of a CPU's time to compile, for functions that run a few times."""
    try:
        knows = version("jaxlib").startswith(KNOWS_QUICKER_FLAGS)
    except PackageNotFoundError:
        return
    os.environ["XLA_FLAGS"] = quick_flags(QUICKER_FLAGS if knows else QUICK_FLAGS)


def quick_flags(added: Sequence[str] = QUICK_FLAGS) -> str:
    """`XLA_FLAGS` of the environment, and those for that; by default such as change nothing of what XLA counts."""
    flags = os.environ.get("XLA_FLAGS", "")
    for flag in added:
        if flag.partition("=")[0] not in flags:
            flags = f"{flags} {flag}".strip()
    return flags


def cache_compilations() -> None:
    """Has JAX keep what it compiles, which takes a quarter of a second for every new shape; must run before jax is imported."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gaugeblock" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def available_devices() -> tuple[str, ...]:
    """Devices of this machine that subjects can run on: the CPU, and torch's accelerator, whichever backend it comes with."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ("cpu", accelerator.type) if accelerator else ("cpu",)


def unknown_device(name: object) -> str:
    """Why a name is none of torch's device types, or an empty string."""
    import torch

    try:
        is_type = torch.device(name).type == name  # type: ignore[call-overload]  # not with an index
    except (RuntimeError, TypeError):
        is_type = False
    return "" if is_type else f"{name!r} is no device type of torch (one of a backend is known once that is installed)"


def available_world_size(framework: str) -> int:
    """On how many devices an implementation can be judged; rank processes can be as many as one likes, but for torchrun."""
    import torch

    if framework == "torch":
        return torchrun_world_size() or MOST_PROCESSES
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    flag = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(flag[1]) if flag else 1


def torchrun_world_size() -> int:
    """How many ranks torchrun has started; 0 if it did not start this run."""
    return int(os.environ[RANKS].rsplit(":", 1)[1]) if RANKS in os.environ else 0


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run in the interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
