"""Layers whose parameters a state dict holds by name: `linear(state, "to_q", x)` multiplies by `state["to_q.weight"]`."""

from collections.abc import Mapping

import jax

from gaugeblock.reference.jax import convolutions, layers, norms

State = Mapping[str, jax.Array]


def linear(state: State, name: str, inputs: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.modules.linear`."""
    return layers.linear(inputs, state[f"{name}.weight"], state.get(f"{name}.bias"))


def convolution(state: State, name: str, images: jax.Array, *, stride: int = 1, padding: int | None = None) -> jax.Array:
    """As `gaugeblock.reference.torch.modules.convolution`."""
    return convolutions.convolution(images, state[f"{name}.weight"], state[f"{name}.bias"], stride=stride, padding=padding)


def group_norm(state: State, name: str, images: jax.Array, *, num_groups: int, eps: float) -> jax.Array:
    """As `gaugeblock.reference.torch.modules.group_norm`."""
    return norms.group_norm(images, state[f"{name}.weight"], state[f"{name}.bias"], num_groups=num_groups, eps=eps)


def group_norm_silu(state: State, name: str, images: jax.Array, *, num_groups: int, eps: float) -> jax.Array:
    """As `gaugeblock.reference.torch.modules.group_norm_silu`."""
    return norms.group_norm_silu(images, state[f"{name}.weight"], state[f"{name}.bias"], num_groups=num_groups, eps=eps)


def layer_norm(state: State, name: str, hidden_states: jax.Array, *, eps: float) -> jax.Array:
    """As `gaugeblock.reference.torch.modules.layer_norm`."""
    return norms.layer_norm_affine(hidden_states, state[f"{name}.weight"], state[f"{name}.bias"], eps=eps)


def rms_norm(state: State, name: str, hidden_states: jax.Array, *, eps: float) -> jax.Array:
    """As `gaugeblock.reference.torch.modules.rms_norm`."""
    return norms.rms_norm(hidden_states, state[f"{name}.weight"], eps=eps)


def two_linears(state: State, names: tuple[str, str], inputs: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.modules.two_linears`."""
    return linear(state, names[1], jax.nn.silu(linear(state, names[0], inputs)))
