"""What a good call of a language model over ranks is, and what the ranks agree on before they exchange anything.

A check takes what its operation takes, and raises what it raises.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed.expert_calls import NO_FACTS, Facts
from gaugeblock.optimized.distributed.model_calls import agree_on_model_call
from gaugeblock.optimized.model_parts import State
from gaugeblock.reference import validation
from gaugeblock.reference.configs import SDARConfig, SDARMoEConfig
from gaugeblock.reference.torch import dream, llada, sdar

Check = Callable[..., None]


def agree_on_call(check: Check, state: State, *arrays: Any, config: Any, mesh: DeviceMesh, sizes: Facts = NO_FACTS) -> None:
    """Raise on every rank what is wrong with the call of any; one small exchange, for which the host waits.

    Args:
        check: Of the operation.
        state: And arrays and config as of the operation; the state is whole on every rank, its values are not compared.
        mesh: One-dimensional; its device type is that of the tensors.
        sizes: Of the arrays, by name, which the ranks must have alike; they have as many layers in any case.
    """
    alike = {"num_hidden_layers": lambda: config.num_hidden_layers, **sizes}
    agree_on_model_call("state", lambda: next(iter(state.values())), partial(check, state, *arrays, config=config), alike, mesh)


def _check_masked(
    shapes: Callable[[Any], Mapping[str, tuple[int, ...]]], state: State, input_ids: Any, attention_mask: Any = None, *,
    config: Any,
) -> None:  # fmt: skip
    validation.language_model(state, input_ids, attention_mask, config, shapes(config))


def _check_sdar(config_class: type, state: State, input_ids: Any, *, config: Any) -> None:
    validation.language_model_config(config, config_class)
    _check_masked(sdar.state_shapes, state, input_ids, config=config)


def check_sdar_cached(state: State, input_ids: Any, past_keys: Any, past_values: Any, *, config: Any) -> None:
    """Check a call of `sdar.sdar_cached`."""
    validation.language_model_config(config, SDARConfig, SDARMoEConfig)
    validation.sdar_cached(state, input_ids, past_keys, past_values, config, sdar.state_shapes(config))


def check_sdar_training(state: State, noisy_ids: Any, clean_ids: Any, sample_ids: Any, *, config: Any) -> None:
    """Check a call of `sdar.sdar_training`."""
    validation.language_model_config(config, SDARConfig, SDARMoEConfig)
    validation.sdar_training(state, noisy_ids, clean_ids, sample_ids, config, sdar.state_shapes(config))


check_llada: Check = partial(_check_masked, llada.state_shapes)
check_dream: Check = partial(_check_masked, dream.state_shapes)
check_sdar: Check = partial(_check_sdar, SDARConfig)
check_sdar_moe: Check = partial(_check_sdar, SDARMoEConfig)
