"""What ranks that share one MMDiT agree on: `model_calls.py` for its arguments."""

from collections.abc import Callable, Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed.model_calls import agree_on_model_call
from gaugeblock.reference import validation
from gaugeblock.reference.configs import MMDiTConfig
from gaugeblock.reference.torch.mmdit import state_shapes


def agree_on_call(
    state: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor,
    timesteps: torch.Tensor,
    config: MMDiTConfig,
    mesh: DeviceMesh,
    require_fitting: Callable[[int], None],
) -> None:
    """Raise on every rank what is wrong with the call of any; one small exchange, for which the host waits.

    Args:
        state: And all others as of `mmdit.mmdit`, whole on every rank; their values are not compared.
        require_fitting: Raises ValueError where so many ranks cannot share the model.
    """

    def check() -> None:
        shapes = state_shapes(config)
        validation.mmdit(state, latents, encoder_hidden_states, pooled_projections, timesteps, config, shapes)
        require_fitting(mesh.size())

    sizes = {
        "batch_size": lambda: latents.shape[0],
        "height": lambda: latents.shape[2],
        "width": lambda: latents.shape[3],
        "num_text_tokens": lambda: encoder_hidden_states.shape[1],
    }
    agree_on_model_call("latents", lambda: latents, check, sizes, mesh)
