"""Where a run took place, so that two of them can be told apart."""

import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gaugeblock

PACKAGES = ("torch", "triton", "jax", "jaxlib", "numpy", "hypothesis", "pytest")
VARIABLES = (
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "XLA_FLAGS",
    "JAX_PLATFORMS",
)


def capture_environment() -> dict[str, Any]:
    """Versions, machine, settings and commit of this run, as plain data; imports no framework.

    Returns:
        `time` (ISO 8601, UTC), `versions` (of what is installed), `platform`, `cpu`, `cores` (that this process may
        use), `gpus` (name, and a GPU's capability; empty unless torch is loaded and sees one), `variables` (those set that
        change results), `git` (`commit` and `dirty` of the current folder's checkout, or None outside of one).
    """
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "gaugeblock": gaugeblock.__version__,
            "python": platform.python_version(),
            **_installed(),
        },
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": _gpus(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "git": _git(),
    }


def describe(environment: dict[str, Any]) -> dict[str, str]:
    """The same as a few labelled lines for people."""
    git = environment.get("git")
    lines = {
        "time": environment.get("time", ""),
        "versions": ", ".join(f"{name} {number}" for name, number in environment.get("versions", {}).items()),
        "platform": environment.get("platform", ""),
        "processor": f"{environment.get('cpu', '')}, {environment.get('cores', '?')} cores",
        "GPU": ", ".join(
            each["name"] + (f" (capability {each['capability']})" if "capability" in each else "")
            for each in environment.get("gpus", ())
        ),
        "variables": ", ".join(f"{name}={value}" for name, value in environment.get("variables", {}).items()),
        **_part(environment.get("part", {})),
        "commit": f"{git['commit']}{' with uncommitted changes' if git['dirty'] else ''}" if git else "",
    }
    return {label: text for label, text in lines.items() if text}


def _part(part: dict[str, Any]) -> dict[str, str]:
    """Which part of a run this is, as labelled lines."""
    since, shard = part.get("since"), part.get("shard")
    return {
        "since": f"{since['revision']} ({since['commit']}): {since['untouched']} verdicts left out" if since else "",
        "shard": f"{shard['number']}/{shard['of']} of {shard['total']} verdicts" if shard else "",
    }


def _installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> list[dict[str, str]]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.accelerator.is_available():
        return []
    if not torch.cuda.is_available():
        return [{"name": str(torch.accelerator.current_accelerator())}] * torch.accelerator.device_count()
    devices = range(torch.cuda.device_count())
    return [
        {
            "name": torch.cuda.get_device_name(each),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(each))),
        }
        for each in devices
    ]


def _git() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, no commit yet
        return None
