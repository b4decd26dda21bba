"""What ranks that share one DiT agree on before they exchange anything: that all of them made the same good call."""

from collections.abc import Callable, Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed.agreement import agree
from gaugeblock.optimized.distributed.expert_calls import require_one_dimension
from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.torch.dit import state_shapes


def agree_on_call(
    state: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor,
    config: DiTConfig,
    mesh: DeviceMesh,
    require_fitting: Callable[[int], None] = lambda ranks: None,
    *,
    batch_is_alike: bool = True,
) -> None:
    """Raise on every rank what is wrong with the call of any; one small exchange, for which the host waits.

    Args:
        state: And all others as of `dit.dit`, whole on every rank, or the rank's part of a batch; their values are not compared.
        require_fitting: Raises ValueError where so many ranks cannot share the model.
        batch_is_alike: Whether every rank has the whole batch.
    """
    require_one_dimension(mesh)
    error, facts = None, dict.fromkeys(("latents must have the same batch_size", "latents must have the same dtype"), 0)
    try:
        validation.dit(state, latents, timesteps, class_labels, config, state_shapes(config))
        validation.class_labels_in_range(class_labels, config.num_classes)
        if latents.device.type != mesh.device_type:
            raise ValueError(f"latents must be on the device of mesh, {mesh.device_type}, got {latents.device}")
        require_fitting(mesh.size())
    except (TypeError, ValueError) as raised:
        error = raised  # raised again once the other ranks know
    else:
        dtype = validation.FLOATING.index(validation.dtype_name(latents))
        facts = dict(zip(facts, (latents.shape[0] if batch_is_alike else 0, dtype), strict=True))
    agree(torch.zeros(mesh.size(), dtype=torch.int64, device=mesh.device_type), facts, error, mesh)
