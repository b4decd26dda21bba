"""What ranks that share one model agree on before they exchange anything: that all of them made the same good call."""

from collections.abc import Callable

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed.agreement import agree
from gaugeblock.optimized.distributed.expert_calls import Facts, require_one_dimension
from gaugeblock.reference import validation


def agree_on_model_call(
    name: str, argument: Callable[[], torch.Tensor], check: Callable[[], None], sizes: Facts, mesh: DeviceMesh
) -> None:
    """Raise on every rank what is wrong with the call of any; one small exchange, for which the host waits.

    Args:
        name: Of the argument whose dtype all others follow.
        argument: Returns that argument, or one of its tensors; asked where the call is good.
        check: Raises TypeError or ValueError where this rank's call is bad.
        sizes: Of that argument and others, by name, which the ranks must have alike; looked at where the call is good.
        mesh: One-dimensional; its device type is that of the tensors.
    """
    require_one_dimension(mesh)
    error, facts = None, dict.fromkeys((f"{name} must have the same {each}" for each in (*sizes, "dtype")), 0)
    try:
        check()
        tensor = argument()
        if tensor.device.type != mesh.device_type:
            raise ValueError(f"{name} must be on the device of mesh, {mesh.device_type}, got {tensor.device}")
    except (TypeError, ValueError) as raised:
        error = raised  # raised again once the other ranks know
    else:
        dtype = validation.FLOATING.index(validation.dtype_name(tensor))
        facts = dict(zip(facts, (*(size() for size in sizes.values()), dtype), strict=True))
    agree(torch.zeros(mesh.size(), dtype=torch.int64, device=mesh.device_type), facts, error, mesh)
