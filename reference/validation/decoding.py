"""Calls of loops that decode."""

from typing import Any

from gaugeblock.reference.validation.arrays import INTEGER, require_dtype, require_same_device, require_shape


def decoding(prompt_ids: Any, example_ids: Any, config: Any, kind: type) -> None:
    """Check the arguments that the loops of `decoding` share."""
    if not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__}, got {type(config).__name__}")
    require_dtype("prompt_ids", prompt_ids, INTEGER)
    require_shape("prompt_ids", prompt_ids, batch_size=None, prompt_length=None)
    require_dtype("example_ids", example_ids, (*INTEGER, "uint32"))
    require_shape("example_ids", example_ids, batch_size=prompt_ids.shape[0])
    require_same_device("example_ids", example_ids, "prompt_ids", prompt_ids)
