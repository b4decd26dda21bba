"""What a call must look like: the checks at the public entrance of every operation, for any array framework.

One function per operation, with the operation's own arguments. Each returns None, or raises

- `TypeError` where an argument is not an array, has the wrong dtype, or is an option that must be an integer;
- `ValueError` where a rank, a size, a device or a value is wrong;

and the message begins with the argument's name. Only `.shape`, `.dtype` and `.device` are read, so a check
starts no kernel; `expert_ids_in_range` alone reads values.
"""

import sys
from typing import Any

FLOATING = ("bfloat16", "float16", "float32", "float64")
INTEGER = ("int8", "int16", "int32", "int64", "uint8")


def softmax_topk(router_logits: Any, top_k: int) -> None:
    """Check the arguments of `routers.softmax_topk`."""
    _dtype("router_logits", router_logits, FLOATING)
    _shape("router_logits", router_logits, num_tokens=None, num_experts=None)
    _between("top_k", top_k, 1, router_logits.shape[1], "num_experts=")


def grouped_sigmoid_topk(
    router_logits: Any, e_score_correction_bias: Any, top_k: int, num_groups: int, topk_groups: int
) -> None:
    """Check the arguments of `routers.grouped_sigmoid_topk`."""
    softmax_topk(router_logits, top_k)
    num_experts = router_logits.shape[1]
    _dtype("e_score_correction_bias", e_score_correction_bias, FLOATING)
    _shape("e_score_correction_bias", e_score_correction_bias, num_experts=num_experts)
    _same_device("e_score_correction_bias", e_score_correction_bias, "router_logits", router_logits)
    _between("num_groups", num_groups, 1, num_experts, "num_experts=")
    if num_experts % num_groups:
        raise ValueError(f"num_groups must divide num_experts={num_experts}, got {num_groups}")
    _between("topk_groups", topk_groups, 1, num_groups, "num_groups=")
    kept_experts = topk_groups * num_experts // num_groups
    _between("top_k", top_k, 1, kept_experts, "experts in the kept groups=")


def fused_swiglu(hidden_states: Any, w13: Any, w2: Any, topk_weights: Any, topk_ids: Any) -> None:
    """Check the arguments of `experts.fused_swiglu`; the ids' values are left to `expert_ids_in_range`."""
    _dtype("hidden_states", hidden_states, FLOATING)
    _dtype("w13", w13, (dtype_name(hidden_states),))
    _dtype("w2", w2, (dtype_name(hidden_states),))
    _dtype("topk_weights", topk_weights, FLOATING)
    _dtype("topk_ids", topk_ids, INTEGER)

    _shape("hidden_states", hidden_states, num_tokens=None, hidden_size=None)
    num_tokens, hidden_size = hidden_states.shape
    _shape("w13", w13, num_experts=None, twice_intermediate_size=None, hidden_size=hidden_size)
    num_experts, gate_and_up = w13.shape[:2]
    if num_experts == 0:
        raise ValueError(f"w13 must hold at least one expert, got {tuple(w13.shape)}")
    if gate_and_up % 2:
        raise ValueError(f"w13 must hold as many gate rows as up rows, got {gate_and_up} rows")
    _shape("w2", w2, num_experts=num_experts, hidden_size=hidden_size, intermediate_size=gate_and_up // 2)
    _shape("topk_ids", topk_ids, num_tokens=num_tokens, top_k=None)
    _shape("topk_weights", topk_weights, num_tokens=num_tokens, top_k=topk_ids.shape[1])

    for name, array in (("w13", w13), ("w2", w2), ("topk_weights", topk_weights), ("topk_ids", topk_ids)):
        _same_device(name, array, "hidden_states", hidden_states)


def expert_ids_in_range(topk_ids: Any, num_experts: int) -> None:
    """Check that every id names an expert, unless it cannot be read: a JAX tracer, a CUDA graph's capture."""
    if not _is_readable(topk_ids):
        return
    # JAX on the host: inside an outer jit even operations on constants are traced, and each compiles anew
    ids = topk_ids if _is_torch_tensor(topk_ids) else topk_ids.__array__()
    if bool(((ids < 0) | (ids >= num_experts)).any()):
        low, high = int(ids.min()), int(ids.max())
        raise ValueError(f"topk_ids must be in 0..{num_experts - 1}, got {low}..{high}")


def random_draw(seed: Any, step: Any, example: Any, purpose: Any) -> None:
    """Check what a draw of `random` is keyed by; of step and example as arrays, no value is read."""
    _between("seed", seed, 0, 2**64 - 1)
    _between("purpose", purpose, 0, 2**32 - 1)
    for name, value in (("step", step), ("example", example)):
        if hasattr(value, "dtype"):
            _dtype(name, value, (*INTEGER, "uint32"))
        else:
            _between(name, value, 0, 2**32 - 1)


def dtype_name(array: Any) -> str:
    """Return the name that a dtype has in every framework: "float32" for torch.float32."""
    return str(array.dtype).removeprefix("torch.")


def _dtype(name: str, array: Any, allowed: tuple[str, ...]) -> None:
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    if dtype_name(array) not in allowed:
        raise TypeError(f"{name} must be {' or '.join(allowed)}, got {dtype_name(array)}")


def _shape(name: str, array: Any, **sizes: int | None) -> None:
    """Check rank and sizes; a size of None is free."""
    shape = tuple(array.shape)
    if len(shape) != len(sizes) or any(
        size is not None and size != actual for size, actual in zip(sizes.values(), shape, strict=True)
    ):
        expected = ", ".join(axis if size is None else f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"{name} must be [{expected}], got {shape}")


def _between(name: str, value: Any, low: int, high: int, high_name: str = "") -> None:
    """Check that an option is an integer in low..high."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high_name}{high}, got {value}")


def _same_device(name: str, array: Any, other_name: str, other: Any) -> None:
    """Check torch tensors only: JAX places its arrays itself, and a sharded one has no single device."""
    if _is_torch_tensor(array) and _is_torch_tensor(other) and array.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {array.device}")


def _is_readable(array: Any) -> bool:
    if _is_torch_tensor(array):
        cuda = sys.modules["torch"].cuda
        return not (array.is_meta or (array.is_cuda and cuda.is_current_stream_capturing()))
    jax = sys.modules.get("jax")
    return jax is None or not isinstance(array, jax.core.Tracer)


def _is_torch_tensor(array: Any) -> bool:
    # an array's framework has been imported by its maker, so that it need not be imported here
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)
