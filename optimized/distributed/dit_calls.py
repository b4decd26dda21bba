"""What ranks that share one DiT agree on before they exchange anything: that all of them made the same good call."""

from collections.abc import Callable, Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed.model_calls import agree_on_model_call
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
) -> None:
    """Raise on every rank what is wrong with the call of any; one small exchange, for which the host waits.

    Args:
        state: And all others as of `dit.dit`, whole on every rank; their values are not compared.
        require_fitting: Raises ValueError where so many ranks cannot share the model.
    """

    def check() -> None:
        validation.dit(state, latents, timesteps, class_labels, config, state_shapes(config))
        validation.class_labels_in_range(class_labels, config.num_classes)
        require_fitting(mesh.size())

    agree_on_model_call("latents", lambda: latents, check, {"batch_size": lambda: latents.shape[0]}, mesh)
