"""`gaugeblock check` under torchrun: the same run, with the ranks of a pool on as many machines as torchrun was started on.

torchrun's rank 0 leads: it judges, prints and writes. Every other one keeps the process of its rank as the leader asks
(`agent.py`), so that a rank that is lost can be replaced, and ends with the leader's exit status.
"""

import os
from collections.abc import Callable
from typing import Any

from gaugeblock.conformance.engine.devices import RANKS
from gaugeblock.conformance.engine.processes import agent
from gaugeblock.conformance.engine.processes.agent import FOREVER, connect

NO_WORD = 1  # exit status where the leader ended without telling its own


def is_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def run(lead: Callable[[], int]) -> int:
    """Calls `lead` in rank 0, with the pools of this run told where the ranks are; returns its exit status in every rank."""
    host, port, rank, size = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    store = _join_store(host, int(port))
    if rank != "0":
        agent.serve(host, int(port), [int(rank)])
        status = int(store.get("status")) if store.check(["status"]) else NO_WORD
        store.set(f"left/{rank}", b"")
        return status
    os.environ[RANKS] = f"{host}:{port}:{size}"
    keeper = agent.start_thread(host, int(port), [0])
    status = NO_WORD
    try:
        status = lead()
    finally:
        store.set("status", str(status))
        store.set("over", b"")
        keeper.join()
        others = [f"left/{each}" for each in range(1, int(size))]
        if others:
            store.wait(others)  # the store may be this process's own
    return status


def _join_store(host: str, port: int) -> Any:
    """torchrun's own store; where torchrun keeps none, rank 0's."""
    import torch.distributed as dist

    if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=FOREVER)
    return connect(host, port)
