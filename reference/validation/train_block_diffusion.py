"""Calls of the training step of masked and block diffusion language models."""

from collections.abc import Mapping
from typing import Any

from gaugeblock.reference.configs import IGNORED_LABEL, BlockDiffusionConfig
from gaugeblock.reference.validation.arrays import INTEGER, require_dtype, require_same_device, require_shape, require_values
from gaugeblock.reference.validation.training import training_state


def block_diffusion_step(
    state: Any,
    input_ids: Any,
    labels: Any,
    sample_ids: Any,
    example_ids: Any,
    config: BlockDiffusionConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check the arguments of `train_block_diffusion.train_step`, whose model has parameters of these shapes."""
    block_diffusion_batch(input_ids, labels, sample_ids, example_ids, config)
    if input_ids.shape[0] == 0:
        raise ValueError(f"input_ids must hold at least one example, got {tuple(input_ids.shape)}")
    if isinstance(state, Mapping):
        for name, array in state.items():
            require_same_device(f"state[{name!r}]", array, "input_ids", input_ids)
    training_state(state, shapes, config)


def block_diffusion_batch(input_ids: Any, labels: Any, sample_ids: Any, example_ids: Any, config: BlockDiffusionConfig) -> None:
    """Check a batch, or one rank's part of it, which may hold no example."""
    require_dtype("input_ids", input_ids, ("int32", "int64"))
    require_shape("input_ids", input_ids, batch_size=None, num_tokens=None)
    batch_size, num_tokens = input_ids.shape
    if num_tokens < 1:
        raise ValueError(f"input_ids must have one token at least, got {tuple(input_ids.shape)}")
    for name, array in (("labels", labels), ("sample_ids", sample_ids)):
        require_dtype(name, array, ("int32", "int64"))
        require_shape(name, array, batch_size=batch_size, num_tokens=num_tokens)
        require_same_device(name, array, "input_ids", input_ids)
    require_dtype("example_ids", example_ids, (*INTEGER, "uint32"))
    require_shape("example_ids", example_ids, batch_size=batch_size)
    require_same_device("example_ids", example_ids, "input_ids", input_ids)
    require_values("input_ids", input_ids, config.model.vocab_size - 1)
    require_values("labels", labels, config.model.vocab_size - 1, or_else=IGNORED_LABEL)
