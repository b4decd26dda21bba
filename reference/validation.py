"""What a call must look like: the checks at the public entrance of every operation, for any array framework.

One function per operation, with the operation's own arguments. Each returns None, or raises

- `TypeError` where an argument is not an array, has the wrong dtype, or is an option that must be an integer;
- `ValueError` where a rank, a size, a device or a value is wrong;

and the message begins with the argument's name. Only `.shape`, `.dtype` and `.device` are read, so a check
starts no kernel; `expert_ids_in_range` and `class_labels_in_range` alone read values.
"""

import math
import sys
from collections.abc import Collection, Mapping
from typing import Any, get_args

from gaugeblock.reference.configs import DiTConfig, VelocitySign

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


def mixtral_moe(hidden_states: Any, state: Any, top_k: int) -> None:
    """Check the arguments of `moe_layers.mixtral_moe`."""
    _dtype("hidden_states", hidden_states, FLOATING)
    _shape("hidden_states", hidden_states, num_tokens=None, hidden_size=None)
    _entry_names("state", state, ("gate.weight", "experts.gate_up_proj", "experts.down_proj"))
    entries = {f"state[{name!r}]": array for name, array in state.items()}
    gate, w13, w2 = "state['gate.weight']", "state['experts.gate_up_proj']", "state['experts.down_proj']"
    for name, array in entries.items():
        _dtype(name, array, (dtype_name(hidden_states),))
        _same_device(name, array, "hidden_states", hidden_states)

    hidden_size = hidden_states.shape[1]
    _shape(gate, entries[gate], num_experts=None, hidden_size=hidden_size)
    num_experts = entries[gate].shape[0]
    _shape(w2, entries[w2], num_experts=num_experts, hidden_size=hidden_size, intermediate_size=None)
    _shape(w13, entries[w13], num_experts=num_experts, gate_and_up=2 * entries[w2].shape[2], hidden_size=hidden_size)
    _between("top_k", top_k, 1, num_experts, "num_experts=")


def load_balancing_loss(router_logits: Any, topk_ids: Any, attention_mask: Any) -> None:
    """Check the arguments of `moe_layers.load_balancing_loss`; the ids' values are left to `expert_ids_in_range`."""
    router_z_loss(router_logits, attention_mask)
    _dtype("topk_ids", topk_ids, INTEGER)
    _shape("topk_ids", topk_ids, num_tokens=router_logits.shape[0], top_k=None)
    if topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids must hold at least one expert per token, got {tuple(topk_ids.shape)}")
    _same_device("topk_ids", topk_ids, "router_logits", router_logits)


def router_z_loss(router_logits: Any, attention_mask: Any) -> None:
    """Check the arguments of `moe_layers.router_z_loss`."""
    _dtype("router_logits", router_logits, FLOATING)
    _shape("router_logits", router_logits, num_tokens=None, num_experts=None)
    num_tokens, num_experts = router_logits.shape
    if num_experts == 0:
        raise ValueError(f"router_logits must hold at least one expert, got {tuple(router_logits.shape)}")
    _dtype("attention_mask", attention_mask, ("bool",))
    _shape("attention_mask", attention_mask, num_tokens=num_tokens)
    _same_device("attention_mask", attention_mask, "router_logits", router_logits)


def rectified_flow(data: Any, noise: Any) -> None:
    """Check the data and the noise of the functions of `objectives`."""
    _dtype("data", data, FLOATING)
    if len(data.shape) < 2:
        raise ValueError(f"data must be [batch_size, ...], got {tuple(data.shape)}")
    _like_data("noise", noise, data)


def rectified_flow_times(times: Any, batch_size: int) -> None:
    """Check the times of `objectives.rectified_flow_interpolate`."""
    _dtype("times", times, FLOATING)
    _shape("times", times, batch_size=batch_size)


def rectified_flow_prediction(prediction: Any, data: Any) -> None:
    """Check the prediction of `objectives.rectified_flow_loss`."""
    _like_data("prediction", prediction, data)


def velocity_sign(velocity: Any) -> None:
    """Check which way a velocity is said to point."""
    if velocity not in get_args(VelocitySign):
        raise ValueError(f"velocity must be {' or '.join(map(repr, get_args(VelocitySign)))}, got {velocity!r}")


def euler_sample(noise: Any, labels: Any, num_steps: Any, velocity: Any) -> None:
    """Check the arguments of `samplers.euler_sample`."""
    _dtype("noise", noise, ("float32", "float64"))
    if len(noise.shape) < 2:
        raise ValueError(f"noise must be [batch_size, ...], got {tuple(noise.shape)}")
    _dtype("labels", labels, INTEGER)
    _shape("labels", labels, batch_size=noise.shape[0])
    _between("num_steps", num_steps, 1, 2**31 - 1)
    velocity_sign(velocity)


def image_diffusion_step(
    state: Any, images: Any, labels: Any, example_ids: Any, model: DiTConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check the arguments of `train_image_diffusion.train_step`, whose model has parameters of these shapes."""
    image_diffusion_batch(images, labels, example_ids, model)
    if images.shape[0] == 0:
        raise ValueError(f"images must hold at least one example, got {tuple(images.shape)}")
    image_diffusion_state(state, shapes, like=images)


def image_diffusion_batch(images: Any, labels: Any, example_ids: Any, model: DiTConfig) -> None:
    """Check a batch, or one rank's part of it, which may hold no example."""
    _dtype("images", images, ("float32", "float64"))
    sizes = {"in_channels": model.in_channels, "height": model.input_size, "width": model.input_size}
    _shape("images", images, batch_size=None, **sizes)
    for name, array in (("labels", labels), ("example_ids", example_ids)):
        _dtype(name, array, (*INTEGER, "uint32"))
        _shape(name, array, batch_size=images.shape[0])
        _same_device(name, array, "images", images)
    _values_in_range("labels", labels, model.num_classes - 1)


def image_diffusion_state(state: Any, shapes: Mapping[str, tuple[int, ...]], like: Any = None) -> None:
    """Check the state of a run: parameters of these shapes, dtype and device of `like` (default: of its first entry)."""
    parts = {f"{part}.{name}": shape for part in ("model", "exp_avg", "exp_avg_sq") for name, shape in shapes.items()}
    _entry_names("state", state, (*parts, "step"))
    if like is None:
        first = next(iter(parts))
        like = state[first]
        _dtype(f"state[{first!r}]", like, ("float32", "float64"))
    state_entries({name: state[name] for name in parts}, parts, like=like)
    _dtype("state['step']", state["step"], INTEGER)
    _shape("state['step']", state["step"])


def expert_ids_in_range(topk_ids: Any, num_experts: int) -> None:
    """Check that every id names an expert, unless it cannot be read: a JAX tracer, a CUDA graph's capture."""
    _values_in_range("topk_ids", topk_ids, num_experts - 1)


def layer_norm_modulate(hidden_states: Any, shift: Any, scale: Any, eps: Any) -> None:
    """Check the arguments of `layers.layer_norm_modulate`."""
    _tokens("hidden_states", hidden_states)
    batch_size, _, hidden_size = hidden_states.shape
    for name, array in (("shift", shift), ("scale", scale)):
        _like(name, array, "hidden_states", hidden_states, batch_size=batch_size, hidden_size=hidden_size)
    _positive("eps", eps)


def gated_residual(residual: Any, branch: Any, gate: Any) -> None:
    """Check the arguments of `layers.gated_residual`."""
    _tokens("residual", residual)
    batch_size, num_tokens, hidden_size = residual.shape
    _like("branch", branch, "residual", residual, batch_size=batch_size, num_tokens=num_tokens, hidden_size=hidden_size)
    _like("gate", gate, "residual", residual, batch_size=batch_size, hidden_size=hidden_size)


def gated_residual_layer_norm_modulate(residual: Any, branch: Any, gate: Any, shift: Any, scale: Any, eps: Any) -> None:
    """Check the arguments of `layers.gated_residual_layer_norm_modulate`."""
    gated_residual(residual, branch, gate)
    layer_norm_modulate(residual, shift, scale, eps)


def self_attention(
    hidden_states: Any, qkv_weight: Any, qkv_bias: Any, proj_weight: Any, proj_bias: Any, num_heads: Any
) -> None:
    """Check the arguments of `layers.self_attention`."""
    _tokens("hidden_states", hidden_states)
    hidden_size = hidden_states.shape[2]
    _between("num_heads", num_heads, 1, hidden_size, "hidden_size=")
    if hidden_size % num_heads:
        raise ValueError(f"num_heads must divide hidden_size={hidden_size}, got {num_heads}")
    thrice = {"three_hidden_sizes": 3 * hidden_size}
    _like("qkv_weight", qkv_weight, "hidden_states", hidden_states, **thrice, hidden_size=hidden_size)
    _like("qkv_bias", qkv_bias, "hidden_states", hidden_states, **thrice)
    _like("proj_weight", proj_weight, "hidden_states", hidden_states, hidden_size=hidden_size, in_features=hidden_size)
    _like("proj_bias", proj_bias, "hidden_states", hidden_states, hidden_size=hidden_size)


def gelu_mlp(hidden_states: Any, fc1_weight: Any, fc1_bias: Any, fc2_weight: Any, fc2_bias: Any) -> None:
    """Check the arguments of `layers.gelu_mlp`."""
    _tokens("hidden_states", hidden_states)
    hidden_size = hidden_states.shape[2]
    _like("fc1_weight", fc1_weight, "hidden_states", hidden_states, intermediate_size=None, hidden_size=hidden_size)
    inner = {"intermediate_size": fc1_weight.shape[0]}
    _like("fc1_bias", fc1_bias, "hidden_states", hidden_states, **inner)
    _like("fc2_weight", fc2_weight, "hidden_states", hidden_states, hidden_size=hidden_size, **inner)
    _like("fc2_bias", fc2_bias, "hidden_states", hidden_states, hidden_size=hidden_size)


def timestep_embedding(timesteps: Any, embedding_size: Any, frequency_shift: Any) -> None:
    """Check the arguments of `layers.timestep_embedding`."""
    _dtype("timesteps", timesteps, ("float32", "float64"))
    _shape("timesteps", timesteps, batch_size=None)
    _between("embedding_size", embedding_size, 4, 2**31)
    if embedding_size % 2:
        raise ValueError(f"embedding_size must be even, got {embedding_size}")
    _between("frequency_shift", frequency_shift, 0, 1)


def sincos_position_embedding(grid_size: Any, like: Any) -> None:
    """Check the arguments of `layers.sincos_position_embedding`."""
    _between("grid_size", grid_size, 1, 2**15)
    _dtype("like", like, FLOATING)
    if len(like.shape) == 0 or like.shape[-1] % 4:
        raise ValueError(f"like must be [..., hidden_size], a multiple of 4, got {tuple(like.shape)}")


def patchify(images: Any, patch_size: Any) -> None:
    """Check the arguments of `layers.patchify`."""
    _dtype("images", images, FLOATING)
    _shape("images", images, batch_size=None, channels=None, height=None, width=None)
    _between("patch_size", patch_size, 1, min(images.shape[2:]), "size of the images=")
    if images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(f"images must have sizes that patch_size={patch_size} divides, got {tuple(images.shape)}")


def unpatchify(patches: Any, patch_size: Any) -> None:
    """Check the arguments of `layers.unpatchify`."""
    _dtype("patches", patches, FLOATING)
    _shape("patches", patches, batch_size=None, num_patches=None, values_of_a_patch=None)
    _between("patch_size", patch_size, 1, 2**15)
    if math.isqrt(patches.shape[1]) ** 2 != patches.shape[1]:
        raise ValueError(f"patches must be a square number of patches, got {tuple(patches.shape)}")
    if patches.shape[2] % patch_size**2:
        raise ValueError(f"patches must have patch_size**2={patch_size**2} pixels each, got {tuple(patches.shape)}")


def dit(
    state: Any, latents: Any, timesteps: Any, class_labels: Any, config: DiTConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check the arguments of `dit.dit`, whose parameters have these shapes; the labels stay unread (`class_labels_in_range`)."""
    _dtype("latents", latents, FLOATING)
    sizes = {"in_channels": config.in_channels, "height": config.input_size, "width": config.input_size}
    _shape("latents", latents, batch_size=None, **sizes)
    _dtype("timesteps", timesteps, ("float32", "float64"))
    _dtype("class_labels", class_labels, INTEGER)
    for name, array in (("timesteps", timesteps), ("class_labels", class_labels)):
        _shape(name, array, batch_size=latents.shape[0])
        _same_device(name, array, "latents", latents)
    state_entries(state, shapes, like=latents)


def dit_block(state: Any, hidden_states: Any, conditioning: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check the arguments of `dit.block`, whose parameters have the given shapes."""
    _tokens("hidden_states", hidden_states, hidden_size=shapes["attn.proj.bias"][0])
    batch_size, _, hidden_size = hidden_states.shape
    _like("conditioning", conditioning, "hidden_states", hidden_states, batch_size=batch_size, hidden_size=hidden_size)
    state_entries(state, shapes, like=hidden_states)


def state_entries(state: Any, shapes: Mapping[str, tuple[int, ...]], like: Any = None) -> None:
    """Check that a state has floating arrays of these names and shapes alone, with the dtype and the device of `like`."""
    _entry_names("state", state, shapes)
    for name, shape in shapes.items():
        _dtype(f"state[{name!r}]", state[name], FLOATING if like is None else (dtype_name(like),))
        if tuple(state[name].shape) != shape:
            raise ValueError(f"state must have {name} of shape {shape}, got {tuple(state[name].shape)}")
        if like is not None:
            _same_device(f"state[{name!r}]", state[name], "the inputs", like)


def class_labels_in_range(class_labels: Any, num_classes: int) -> None:
    """Check that every label names a class or is `num_classes`, unless it cannot be read, like `expert_ids_in_range`."""
    _values_in_range("class_labels", class_labels, num_classes)


def position_table(table: Any, num_patches: int, hidden_size: int) -> None:
    """Check a checkpoint's position table, but for its values."""
    _dtype("state['pos_embed']", table, FLOATING)
    if tuple(table.shape) != (1, num_patches, hidden_size):
        raise ValueError(f"state must have a position table of shape {(1, num_patches, hidden_size)}, got {tuple(table.shape)}")


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


def _tokens(name: str, array: Any, hidden_size: int | None = None) -> None:
    _dtype(name, array, FLOATING)
    _shape(name, array, batch_size=None, num_tokens=None, hidden_size=hidden_size)


def _values_in_range(name: str, array: Any, high: int) -> None:
    """Check that every value is in 0..high, if values can be read."""
    if not _is_readable(array):
        return
    # JAX on the host: inside an outer jit even operations on constants are traced, and each compiles anew
    values = array if _is_torch_tensor(array) else array.__array__()
    if bool(((values < 0) | (values > high)).any()):
        raise ValueError(f"{name} must be in 0..{high}, got {int(values.min())}..{int(values.max())}")


def _like(name: str, array: Any, other_name: str, other: Any, **sizes: int | None) -> None:
    """Check that an array has the dtype and the device of another, and these sizes."""
    _dtype(name, array, (dtype_name(other),))
    _shape(name, array, **sizes)
    _same_device(name, array, other_name, other)


def _positive(name: str, value: Any) -> None:
    """Check that an option is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value}")


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


def _entry_names(name: str, state: Any, expected: Collection[str]) -> None:
    """Check that a state dict has just the expected entries."""
    if not isinstance(state, Mapping):
        raise TypeError(f"{name} must be a dict of arrays, got {type(state).__name__}")
    if set(state) != set(expected):
        missing = [entry for entry in expected if entry not in state]
        unexpected = [entry for entry in state if entry not in expected]
        raise ValueError(f"{name} must have {', '.join(missing) or 'no other entries'}, got {', '.join(unexpected) or 'none'}")


def _like_data(name: str, array: Any, data: Any) -> None:
    """Check that an array is a floating one with the shape and on the device of `data`."""
    _dtype(name, array, FLOATING)
    if tuple(array.shape) != tuple(data.shape):
        raise ValueError(f"{name} must be of the shape of data {tuple(data.shape)}, got {tuple(array.shape)}")
    _same_device(name, array, "data", data)


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
