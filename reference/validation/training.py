"""States of training runs."""

from collections.abc import Container, Mapping
from typing import Any

from gaugeblock.reference.configs import TrainingConfig
from gaugeblock.reference.validation.arrays import (
    INTEGER,
    require_between,
    require_dtype,
    require_entry_names,
    require_same_device,
    require_shape,
    state_entries,
)


def training_state(
    state: Any,
    shapes: Mapping[str, tuple[int, ...]],
    config: TrainingConfig,
    *,
    frozen: Container[str] = (),
    stacked: Container[str] = (),
    like: Any = None,
) -> None:
    """Check the state of a run: parameters of these shapes, dtype and device of `like` (default: of its first entry)."""
    parts = {
        f"{part}.{name}": shape
        for part in config.parts
        for name, shape in shapes.items()
        if part in ("model", "ema") or name not in frozen
    }
    num_updates = {f"num_updates.{name}": shape[0] for name, shape in shapes.items() if name in stacked and name not in frozen}
    require_entry_names("state", state, (*parts, *num_updates, "step"))
    if like is None:
        first = next(iter(parts))
        like = state[first]
        require_dtype(f"state[{first!r}]", like, ("float32", "float64"))
    state_entries({name: state[name] for name in parts}, parts, like=like)
    for name, rows in num_updates.items():
        require_dtype(f"state[{name!r}]", state[name], INTEGER)
        require_shape(f"state[{name!r}]", state[name], rows=rows)
        require_same_device(f"state[{name!r}]", state[name], "the inputs", like)
    require_dtype("state['step']", state["step"], INTEGER)
    require_shape("state['step']", state["step"])


def batch_ids(step: Any, batch_size: Any, num_examples: Any, seed: Any) -> None:
    """Check the arguments of `data_order.batch_ids`."""
    require_between("step", step, 0, 2**32 - 1)
    require_between("batch_size", batch_size, 1, 2**31 - 1)
    require_between("num_examples", num_examples, 1, 2**32)
    require_between("seed", seed, 0, 2**64 - 1)
