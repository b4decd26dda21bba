"""Checks of one argument: array, dtype, sizes, device, range; and of what random draws are keyed by."""

import math
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, get_args

FLOATING = ("bfloat16", "float16", "float32", "float64")
_reads_gpus = ContextVar("whether values on a GPU are read", default=False)
INTEGER = ("int8", "int16", "int32", "int64", "uint8")


def random_draw(seed: Any, step: Any, example: Any, purpose: Any) -> None:
    """Check what a draw of `random` is keyed by; of step and example as arrays, no value is read."""
    require_between("seed", seed, 0, 2**64 - 1)
    require_between("purpose", purpose, 0, 2**32 - 1)
    for name, value in (("step", step), ("example", example)):
        if hasattr(value, "dtype"):
            require_dtype(name, value, (*INTEGER, "uint32"))
        else:
            require_between(name, value, 0, 2**32 - 1)


def dtype_name(array: Any) -> str:
    """Return the name that a dtype has in every framework: "float32" for torch.float32."""
    return str(array.dtype).removeprefix("torch.")


@contextmanager
def gpu_values_checked() -> Iterator[None]:
    """Check values on a GPU too, ids above all; else they are left unread, since the host would have to wait for the device."""
    token = _reads_gpus.set(True)
    try:
        yield
    finally:
        _reads_gpus.reset(token)


def require_values(name: str, array: Any, high: int, *, or_else: int | None = None) -> None:
    """Check that every value is in 0..high, or is the other one, where values are read: on the host, and on a GPU within
    `gpu_values_checked`."""
    if not _is_readable(array):
        return
    # JAX on the host: inside an outer jit even operations on constants are traced, and each compiles anew
    values = array if _is_torch_tensor(array) else array.__array__()
    if or_else is not None:
        values = values[values != or_else]
    if bool(((values < 0) | (values > high)).any()):
        range_of_values = f"0..{high}" if or_else is None else f"0..{high} or {or_else}"
        raise ValueError(f"{name} must be in {range_of_values}, got {int(values.min())}..{int(values.max())}")


def require_interval(
    name: str, array: Any, low: float, high: float, *, low_excluded: bool = False, high_excluded: bool = False
) -> None:
    """Check that every number is in [low, high] or, with ends excluded, within, where values are read as in `require_values`."""
    if not _is_readable(array):
        return
    values = array if _is_torch_tensor(array) else array.__array__()
    above = values > low if low_excluded else values >= low
    if not bool((above & (values < high if high_excluded else values <= high)).all()):
        ends = f"{'(' if low_excluded else '['}{low}, {high}{')' if high_excluded else ']'}"
        raise ValueError(f"{name} must be in {ends}, got {float(values.min())}..{float(values.max())}")


def require_in_rows(name: str, array: Any, value_name: str, value: int) -> None:
    """Check that a value is in every row of [rows, columns], where values are read, as by `require_values`."""
    if not _is_readable(array):
        return
    values = array if _is_torch_tensor(array) else array.__array__()
    if not bool((values == value).any(1).all()):
        raise ValueError(f"{name} must have {value_name}={value} in every row, got a row without it")


def require_like(name: str, array: Any, other_name: str, other: Any, **sizes: int | None) -> None:
    """Check that an array has the dtype and the device of another, and these sizes."""
    require_dtype(name, array, (dtype_name(other),))
    require_shape(name, array, **sizes)
    require_same_device(name, array, other_name, other)


def require_positive(name: str, value: Any) -> None:
    """Check that an option is a finite number above 0."""
    require_number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")


def require_number(name: str, value: Any) -> None:
    """Check that an option is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not abs(value) < math.inf:  # at math.isfinite a graph of torch.compile ends
        raise ValueError(f"{name} must be finite, got {value}")


def require_one_of(name: str, value: Any, names: Any) -> None:
    """Check that an option is one of the names of a `Literal`."""
    if value not in get_args(names):
        raise ValueError(f"{name} must be {' or '.join(map(repr, get_args(names)))}, got {value!r}")


def require_dtype(name: str, array: Any, allowed: tuple[str, ...]) -> None:
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    if dtype_name(array) not in allowed:
        raise TypeError(f"{name} must be {' or '.join(allowed)}, got {dtype_name(array)}")


def require_shape(name: str, array: Any, **sizes: int | None) -> None:
    """Check rank and sizes; a size of None is free."""
    shape = tuple(array.shape)
    if len(shape) != len(sizes) or any(
        size is not None and size != actual for size, actual in zip(sizes.values(), shape, strict=True)
    ):
        expected = ", ".join(axis if size is None else f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"{name} must be [{expected}], got {shape}")


def require_entry_names(name: str, state: Any, expected: Collection[str]) -> None:
    """Check that a state dict has just the expected entries."""
    if not isinstance(state, Mapping):
        raise TypeError(f"{name} must be a dict of arrays, got {type(state).__name__}")
    if set(state) != set(expected):
        missing = [entry for entry in expected if entry not in state]
        unexpected = [entry for entry in state if entry not in expected]
        raise ValueError(f"{name} must have {', '.join(missing) or 'no other entries'}, got {', '.join(unexpected) or 'none'}")


def state_entries(state: Any, shapes: Mapping[str, tuple[int, ...]], like: Any = None, *, name: str = "state") -> None:
    """Check that a state has floating arrays of these names and shapes alone, with the dtype and the device of `like`."""
    require_entry_names(name, state, shapes)
    for entry, shape in shapes.items():
        require_dtype(f"{name}[{entry!r}]", state[entry], FLOATING if like is None else (dtype_name(like),))
        if tuple(state[entry].shape) != shape:
            raise ValueError(f"{name} must have {entry} of shape {shape}, got {tuple(state[entry].shape)}")
        if like is not None:
            require_same_device(f"{name}[{entry!r}]", state[entry], "the inputs", like)


def state_of_one_dtype(state: Any, shapes: Mapping[str, tuple[int, ...]], ids_name: str, ids: Any) -> None:
    """Check a state as `state_entries` does, of any one floating dtype, on the device of a model's ids."""
    state_entries(state, shapes)
    first = next(iter(shapes))
    for name in shapes:
        if dtype_name(state[name]) != dtype_name(state[first]):
            dtypes = f"{dtype_name(state[first])}, got {dtype_name(state[name])}"
            raise TypeError(f"state must have {name} in the dtype of {first}, {dtypes}")
        require_same_device(f"state[{name!r}]", state[name], ids_name, ids)


def require_between(name: str, value: Any, low: int, high: int, high_name: str = "") -> None:
    """Check that an option is an integer in low..high."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high_name}{high}, got {value}")


def require_same_device(name: str, array: Any, other_name: str, other: Any) -> None:
    """Check torch tensors only: JAX places its arrays itself, and a sharded one has no single device."""
    if _is_torch_tensor(array) and _is_torch_tensor(other) and array.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {array.device}")


def _is_readable(array: Any) -> bool:
    if _is_torch_tensor(array):
        if array.device.type in ("cpu", "meta"):
            return not array.is_meta
        is_captured = array.is_cuda and sys.modules["torch"].cuda.is_current_stream_capturing()
        return _reads_gpus.get() and not is_captured
    jax = sys.modules.get("jax")
    return jax is None or not isinstance(array, jax.core.Tracer)


def _is_torch_tensor(array: Any) -> bool:
    # an array's framework has been imported by its maker, so that it need not be imported here
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)
