"""State dicts: parts of them, and how many parameters there are."""

import math
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")
Shapes = dict[str, tuple[int, ...]]


def under(prefix: str, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return entries by the names that they have in the whole: `attn.to_q.weight` as `blocks.3.attn.to_q.weight`."""
    return {f"{prefix}.{name}": entry for name, entry in entries.items()}


def part(state: Mapping[str, Entry], prefix: str) -> dict[str, Entry]:
    """Return the entries of one module, by the module's own names: `blocks.3.attn.to_q.weight` as `attn.to_q.weight`."""
    return {name.removeprefix(f"{prefix}."): entry for name, entry in state.items() if name.startswith(f"{prefix}.")}


def parts(state: Mapping[str, Entry], prefix: str, count: int) -> list[dict[str, Entry]]:
    """Return `part` of each of so many numbered modules (`blocks.0`, `blocks.1`, ...), looking at each name once."""
    found: list[dict[str, Entry]] = [{} for _ in range(count)]
    for name, entry in part(state, prefix).items():
        index, _, own_name = name.partition(".")
        found[int(index)][own_name] = entry
    return found


def of_modules(shapes: Mapping[str, Shapes]) -> Shapes:
    """Return the shapes of the parameters of several modules: `{"to_q": {"weight": (8, 4)}}` as `{"to_q.weight": (8, 4)}`."""
    return {name: shape for module, own in shapes.items() for name, shape in under(module, own).items()}


def num_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many numbers there are in arrays of these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())


def linear_shapes(out_features: int, in_features: int, *, bias: bool = True) -> Shapes:
    """Return the shapes of the parameters of a linear layer."""
    return {"weight": (out_features, in_features)} | ({"bias": (out_features,)} if bias else {})


def convolution_shapes(out_channels: int, in_channels: int, kernel_size: int) -> Shapes:
    """Return the shapes of the parameters of a convolution with a square kernel."""
    return {"weight": (out_channels, in_channels, kernel_size, kernel_size), "bias": (out_channels,)}


def norm_shapes(channels: int) -> Shapes:
    """Return the shapes of the parameters of a norm that scales and shifts."""
    return {"weight": (channels,), "bias": (channels,)}


def connection_shapes(num_streams: int, hidden_size: int) -> Shapes:
    """Return the shapes of the parameters of a hyper-connection."""
    return {
        "norm.gamma": (hidden_size,),
        "static_alpha": (num_streams, 1 + num_streams),
        "dynamic_alpha_fn": (1, hidden_size, 1 + num_streams),
        "pre_branch_scale": (1,),
        "residual_scale": (1,),
        "static_beta": (num_streams, 1, 1),
        "dynamic_beta_fn": (hidden_size, 1),
        "h_post_scale": (),
    }
