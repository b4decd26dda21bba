"""What ranks that share one Flux agree on before they exchange anything: that all of them made the same good call."""

from collections.abc import Callable, Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed.model_calls import agree_on_model_call
from gaugeblock.reference import validation
from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.torch.flux import State, state_shapes


def agree_on_call(
    state: State, arrays: Sequence[torch.Tensor], config: FluxConfig, mesh: DeviceMesh, require_fitting: Callable[[int], None]
) -> None:
    """Raise on every rank what is wrong with the call of any; one small exchange, for which the host waits.

    Args:
        state: And all others as of `flux.flux`, whole on every rank; their values are not compared.
        arrays: From hidden_states to txt_ids.
        require_fitting: Raises ValueError where so many ranks cannot share the model or the tokens.
    """
    hidden_states, encoder_hidden_states, pooled_projections, timesteps, guidance, img_ids, txt_ids = arrays

    def check() -> None:
        validation.flux(
            state, hidden_states, encoder_hidden_states, pooled_projections, timesteps, guidance, img_ids, txt_ids,
            config, state_shapes(config),
        )  # fmt: skip
        require_fitting(mesh.size())

    sizes = {
        "batch_size": lambda: hidden_states.shape[0],
        "num_image_tokens": lambda: hidden_states.shape[1],
        "num_text_tokens": lambda: encoder_hidden_states.shape[1],
    }
    agree_on_model_call("hidden_states", lambda: hidden_states, check, sizes, mesh)
