"""Lets `pytest conformance/x` mean `pytest gaugeblock/conformance/x`, so that no module gets two names."""

import os
from pathlib import Path

import pytest

from gaugeblock.conformance.engine.devices import cache_compilations, compile_quickly, split_cpu_for_jax

compile_quickly()
cache_compilations()
split_cpu_for_jax()  # before any test imports jax
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # what the CPU says of itself; else each is tried, for 15 seconds
os.environ["GAUGEBLOCK_KEPT"] = "off"  # a test judges; those of what is kept name a folder of their own

ROOT = Path(__file__).parent
REALMS = ["reference", "optimized", "conformance"]

collect_ignore = REALMS  # `pytest .` meets them once, inside gaugeblock/


def pytest_configure(config: pytest.Config) -> None:
    config.args[:] = [_through_package(arg) for arg in config.args]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def _through_package(arg: str) -> str:
    path, separator, test = arg.partition("::")
    inside = os.path.relpath(path, ROOT)
    if inside.split(os.sep)[0] not in REALMS:
        return arg
    return f"{ROOT / 'gaugeblock' / inside}{separator}{test}"
