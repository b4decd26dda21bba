"""Calls of a training step of a language model with a mixture of experts."""

from collections.abc import Container, Mapping
from typing import Any

from gaugeblock.reference.configs import IGNORED_LABEL, MoELMConfig
from gaugeblock.reference.validation.arrays import INTEGER, require_dtype, require_same_device, require_shape, require_values
from gaugeblock.reference.validation.training import training_state
from gaugeblock.reference.validation.upcycled_gpt2 import gpt2_input_ids_in_range, token_sequences


def moe_lm_step(
    state: Any,
    input_ids: Any,
    labels: Any,
    example_ids: Any,
    config: MoELMConfig,
    shapes: Mapping[str, tuple[int, ...]],
    stacked: Container[str],
) -> None:
    """Check the arguments of `train_moe_lm.train_step`, whose model has parameters of these shapes."""
    moe_lm_batch(input_ids, labels, example_ids, config)
    if input_ids.shape[0] == 0:
        raise ValueError(f"input_ids must hold at least one example, got {tuple(input_ids.shape)}")
    first = f"model.{next(iter(shapes))}"
    if isinstance(state, Mapping) and first in state:
        require_same_device(f"state[{first!r}]", state[first], "input_ids", input_ids)
    training_state(state, shapes, config, stacked=stacked)


def moe_lm_batch(input_ids: Any, labels: Any, example_ids: Any, config: MoELMConfig) -> None:
    """Check a batch, or one rank's part of it, which may hold no example."""
    token_sequences(input_ids, config.model)
    batch_size, num_tokens = input_ids.shape
    if num_tokens < 2:
        raise ValueError(f"input_ids must have a token to predict after the first, got {num_tokens} tokens")
    require_dtype("labels", labels, ("int32", "int64"))
    require_shape("labels", labels, batch_size=batch_size, num_tokens=num_tokens)
    require_dtype("example_ids", example_ids, (*INTEGER, "uint32"))
    require_shape("example_ids", example_ids, batch_size=batch_size)
    for name, array in (("labels", labels), ("example_ids", example_ids)):
        require_same_device(name, array, "input_ids", input_ids)
    gpt2_input_ids_in_range(input_ids, config.model)
    require_values("labels", labels * (labels != IGNORED_LABEL), config.model.vocab_size - 1)
