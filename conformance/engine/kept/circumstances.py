"""Under which circumstances a verdict is reached: packages, the processor, and what is set in the environment."""

import hashlib
import os
import platform
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

from gaugeblock.conformance.engine.kept.imports import location
from gaugeblock.conformance.engine.vocabulary import DEVICES

PACKAGES = ("torch", "numpy", "triton", "jax", "jaxlib", "optax", "safetensors", "hypothesis")  # and all that these require
# Variables that change what is computed: those of the frameworks, and those by which libraries are told of another CPU.
VARIABLES = re.compile(
    r"(TRITON|TORCH|PYTORCH|ATEN|CUDA|CUBLAS|CUDNN|NVIDIA|NCCL|GLOO|JAX|XLA|TPU|ROCM|HIP|HSA|OMP|GOMP|KMP|MKL|ONEDNN|DNNL"
    r"|OPENBLAS|BLIS|NPY|NUMPY|GLIBC|LD|PYTHONHASHSEED|PYTHONOPTIMIZE)(_.*)?"
)
CACHES = re.compile(r".*_CACHE(_.*)?|(TORCH|TRITON)_HOME|TORCHELASTIC_.*")  # where something is kept, on this machine
CPU = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "Features")  # of /proc/cpuinfo


def variables(mentioned: Collection[str] = ()) -> dict[str, str]:
    """Settings in the environment that may change results, and those that a candidate's text mentions by name."""
    known = {name for name in os.environ if VARIABLES.fullmatch(name) and not CACHES.fullmatch(name)}
    return {name: os.environ[name] for name in sorted(known | (os.environ.keys() & set(mentioned)))}


def machine(device: str) -> dict[str, Any] | None:
    """The processor, the GPU if it is on trial, and what programs are linked with; None of another accelerator.

    Of such there is no telling which driver and compiler there are.
    """
    if device not in DEVICES:
        return None
    found = {
        "python": [platform.python_implementation(), platform.python_version(), sys.flags.optimize],
        "system": [sys.platform, platform.machine(), *platform.libc_ver()],
        "cpu": _cpu(),
    }
    return found | ({"gpu": _gpu()} if device == "cuda" else {})


@cache
def _cpu() -> list[str]:
    import torch

    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:  # not Linux
        first = []
    facts = [" ".join(line.split()) for line in first if line.partition("\t")[0].partition(":")[0].strip() in CPU]
    return [*(facts or [platform.processor()]), torch.backends.cpu.get_cpu_capability()]


@cache
def _gpu() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    names = [f"{torch.cuda.get_device_name(each)} {torch.cuda.get_device_capability(each)}" for each in range(count)]
    driver = Path("/proc/driver/nvidia/version")
    return [*names, str(torch.version.cuda), str(torch.version.hip), driver.read_text() if driver.is_file() else ""]


def packages(modules: Iterable[str] = ()) -> dict[str, str] | None:
    """Versions of the packages that judge, and of those that hold these top-level modules, with all that they require.

    Returns:
        None if a module was installed without a package that could tell its version.
    """
    found = dict(_versions(PACKAGES))
    others = [name for name in sorted(modules) if name not in sys.stdlib_module_names]
    holders = _holders() if any(name not in found for name in others) else {}
    for name in others:
        if name in found:
            continue
        for package in holders.get(name, ()):
            found |= _versions((package,)) | {f"files of {package}": _files(package)}
        if name not in holders:
            if location(name):
                return None
            found[name] = "missing"
    return found


@cache
def _holders() -> Mapping[str, list[str]]:
    return packages_distributions()


@cache
def _versions(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of packages and of what they require, as far as it is installed."""
    found: dict[str, str] = {}
    waiting = [*names]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        known = _distribution(name)
        found[name] = known.version if known else "missing"
        required = known.requires or [] if known else []
        plain = [each for each in required if not re.search(r";.*\bextra\b", each)]
        waiting += [match[0] for each in plain if (match := re.match(r"[\w.-]+", each))]
    return found


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


@cache
def _files(package: str) -> str:
    """What was installed, by the digests of its files: a package that is built anew need not change its version."""
    known = _distribution(package)
    told = (known.read_text("RECORD") or "") if known else ""
    return hashlib.sha256(told.encode()).hexdigest()
