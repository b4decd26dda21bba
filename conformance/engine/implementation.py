"""What claims to fulfil a contract, and what it claims; the rows of our own."""

import importlib
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any

from gaugeblock.conformance.engine.vocabulary import DEVICES, DTYPES, Device, DType, Framework, Kind, Rounding


@dataclass(frozen=True)
class Candidate:
    """A function that a file or module registers, and that only a candidate's process loads."""

    source: str


@dataclass(frozen=True)
class Implementation:
    """Something that claims to fulfil a contract. The defaults are the strong claims."""

    contract: str
    """The contract's name."""
    name: str
    """The implementation's own."""
    function: Callable[..., Any] | str | Candidate
    """What is called; for a built-in row its import path `module:function`, for a user's the source of it."""
    _: KW_ONLY
    kind: Kind = "user"
    """Kernels of kind `triton` are watched as they run."""
    framework: Framework = "torch"
    """Whose arrays it takes and returns."""
    dtypes: tuple[DType, ...] = ("float32",)
    """What it supports."""
    devices: tuple[Device, ...] = ("cpu",)
    """Where it runs."""
    rounding: Rounding = "strict"
    """`strict`: only the operands of matrix products may be rounded to the dtype, all else is float32; `eager`: every operation's
    result may be."""
    differentiable: bool = True
    """Gradients are right."""
    deterministic: bool = True
    """The same call gives the same bits."""
    batch_invariant: bool = True
    """An example's bits do not depend on the other examples."""
    validates: bool = True
    """Bad input raises ValueError or TypeError naming the argument."""
    assumes_zero_masked_lanes: bool = False
    """Its Triton kernels use lanes that were masked without `other`, which hold 0 on today's chips though Triton does not promise
    it."""
    jit: bool = False
    """The engine calls it under `jax.jit`, keyword arguments static, but where a bad value is to be rejected."""
    world_sizes: tuple[int, ...] = ()
    """Numbers of devices that it runs on; it is called with `mesh` too, of one dimension "ranks": in PyTorch once per rank, with
    the rank's shard and a `DeviceMesh`; in JAX once, with global arrays and a `Mesh`."""
    sharding: str = ""
    """How its tensors lie over the ranks: the name of one of the contract's `shardings`, if not the first."""
    only: str = ""
    """Which sizes and options it takes, if not all: an expression of their names, such as `hidden_size % 8 == 0`."""
    memory_gib: float = 8.0
    """GiB of address space that it may take on a CPU."""

    def of(self, contract: str) -> "Implementation":
        """This row as one of a contract's: the function is by default the operation's own in the realm of the row's kind."""
        family, _, operation = contract.partition(".")
        realm = "jax" if self.framework == "jax" else self.kind
        path = self.function or f"{family}:{operation}"
        full = path if isinstance(path, str) and path.startswith("gaugeblock.") else f"gaugeblock.optimized.{realm}.{path}"
        return replace(self, contract=contract, function=full)


CLAIMS = {each.name: each.type for each in fields(Implementation) if each.kw_only}


def triton(function: str = "", *, name: str = "triton", **claims: Any) -> Implementation:
    """A row for Triton kernels of ours; `function` is `module:function` under `optimized.triton`, by default the operation's."""
    return Implementation("", name, function, **{"kind": "triton", "dtypes": DTYPES, "devices": DEVICES} | claims)


def jax(name: str, function: str = "", **claims: Any) -> Implementation:
    """The same under `optimized.jax`."""
    return Implementation("", name, function, **{"kind": "jax", "framework": "jax"} | claims)


def compiled(name: str, function: str = "", **claims: Any) -> Implementation:
    """The same under `optimized.compiled`."""
    return Implementation("", name, function, **{"kind": "compiled", "dtypes": DTYPES} | claims)


def distributed(name: str, function: str = "", **claims: Any) -> Implementation:
    """The same under `optimized.distributed`, or in JAX under `optimized.jax`."""
    return Implementation("", name, function, **{"kind": "distributed"} | claims)


def import_path(path: str) -> Any:
    """The object at `package.module:attribute`."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
