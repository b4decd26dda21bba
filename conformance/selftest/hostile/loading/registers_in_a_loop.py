"""A file that registers one function under more and more names."""

import itertools
from typing import Any

from gaugeblock.conformance import implements


def route(router_logits: Any, *, top_k: int, renormalize: bool) -> Any:
    """Nothing."""


for number in itertools.count():
    implements("routers.softmax_topk", name=f"loop-{number}")(route)
