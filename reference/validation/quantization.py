"""Calls of quantization."""

import sys
from typing import Any

from gaugeblock.reference.validation.arrays import FLOATING, require_between, require_dtype, require_shape


def quantize_token_groups(hidden_states: Any, group_size: Any) -> None:
    """Check the arguments of `quantization.quantize_token_groups`."""
    require_dtype("hidden_states", hidden_states, FLOATING)
    require_shape("hidden_states", hidden_states, num_tokens=None, hidden_size=None)
    require_between("group_size", group_size, 1, sys.maxsize)
