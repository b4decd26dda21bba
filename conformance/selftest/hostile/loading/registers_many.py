"""A file that registers one function under 20,000 names."""

from typing import Any

from gaugeblock.conformance.engine import registry
from gaugeblock.conformance.engine.implementation import Implementation


def route(router_logits: Any, *, top_k: int, renormalize: bool) -> Any:
    """Nothing."""


for number in range(20_000):
    row = Implementation("routers.softmax_topk", f"many-{number}", route)
    registry._registered[row.contract, row.name] = row
