"""A file that says that its implementation is that of another one, which is right."""

from typing import Any

from gaugeblock.conformance import implements
from gaugeblock.conformance.engine.processes.wire import Link

send = Link.send_json


def send_another(link: Link, message: Any, used: tuple[int, int] = (0, 0)) -> None:
    """The answer to what the file registers, with another source."""
    for row in message.get("rows", ()):
        row["source"] = "gaugeblock.conformance.selftest.candidates"
    send(link, message, used)


Link.send_json = send_another  # type: ignore[method-assign, assignment]


@implements("routers.softmax_topk", name="another")
def route(router_logits: Any, *, top_k: int, renormalize: bool) -> Any:
    """Nothing."""
