"""What ranks tell each other before they exchange rows: how many, and whether their calls fit together.

A rank that raised alone would leave the others waiting for ever, so that a bad call is told to all, and raises on all.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

MESSAGE_BYTES = 256  # of an error; what is longer is cut


def agree(rows: torch.Tensor, facts: Mapping[str, int], error: Exception | None, mesh: DeviceMesh) -> tuple[list[int], list[int]]:
    """Tell each rank how many rows it will get from this one, all ranks what must be alike, and of this rank's error.

    One small all-to-all, for whose result the host waits.

    Args:
        rows: [world_size] int64, on the device of the mesh: of this rank, for each other.
        facts: By what an error says of them, in the same order on every rank: `w13 must have the same dtype` and its number.
            Those of a rank with an error are not looked at.
        error: Why this rank's call is bad; None if it is good.
        mesh: One-dimensional.

    Returns:
        sent: Rows for each rank, as told.
        received: Rows from each rank, as heard.

    Raises:
        ValueError: Another rank has an error, whose message is repeated here; or facts differ.
        Exception: This rank's error, if it has one.
    """
    text = torch.frombuffer(bytearray(str(error or "").encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")), dtype=torch.int64)
    told_A = torch.cat([torch.tensor([error is not None, *facts.values()]), text]).to(rows.device)
    told_WA = torch.cat([rows[:, None], told_A.expand(len(rows), -1)], dim=1)
    heard_WA = torch.empty_like(told_WA)
    dist.all_to_all_single(heard_WA, told_WA, group=mesh.get_group())
    heard_WA = torch.cat([heard_WA, rows[:, None]], dim=1).cpu()
    received, failed, *values, sent = heard_WA[:, [*range(2 + len(facts)), -1]].T.tolist()

    if error is not None:
        raise error
    for rank, has_error in enumerate(failed):
        if has_error:
            message = bytes(heard_WA[rank, 2 + len(facts) : -1].contiguous().view(torch.uint8).tolist())
            raise ValueError(f"{message.rstrip(bytes(1)).decode(errors='ignore')} (on rank {rank})")
    for fact, of_ranks in zip(facts, values, strict=True):
        if len(set(of_ranks)) > 1:
            raise ValueError(f"{fact} on every rank, got {of_ranks}")
    return sent, received
