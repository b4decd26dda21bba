"""What the ranks of a language model agree on before they exchange anything."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed.expert_calls import NO_FACTS, Facts
from gaugeblock.optimized.distributed.model_calls import agree_on_model_call
from gaugeblock.optimized.model_parts import State

Check = Callable[..., None]


def agree_on_call(check: Check, state: State, *arrays: Any, config: Any, mesh: DeviceMesh, sizes: Facts = NO_FACTS) -> None:
    """Raise on every rank what is wrong with the call of any; one small exchange, for which the host waits.

    Args:
        check: Takes what the operation takes but the mesh, and raises what it raises.
        state: And arrays and config as of the operation; the state is whole on every rank, its values are not compared.
        mesh: One-dimensional; its device type is that of the tensors.
        sizes: Of the arrays, by name, which the ranks must have alike; they have as many layers in any case.
    """
    alike = {"num_hidden_layers": lambda: config.num_hidden_layers, **sizes}
    agree_on_model_call("state", lambda: next(iter(state.values())), partial(check, state, *arrays, config=config), alike, mesh)
