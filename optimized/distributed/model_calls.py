"""What ranks that share one model agree on before they exchange anything: that all of them made the same good call."""

from collections.abc import Callable, Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed.agreement import agree
from gaugeblock.optimized.distributed.expert_calls import require_one_dimension
from gaugeblock.reference import validation


def agree_on_model_call(
    check: Callable[[], None], name: str, tokens: torch.Tensor, sizes: Mapping[str, tuple[torch.Tensor, int]], mesh: DeviceMesh
) -> None:
    """Raise on every rank what is wrong with the call of any; one small exchange, for which the host waits.

    Args:
        check: Raises TypeError or ValueError where this rank's call is bad.
        name: Of the argument that has the dtype and the device of all others.
        tokens: That argument.
        sizes: What must be alike, by what an error says of it ("latents must have the same height"): a tensor and its axis.
        mesh: Of the ranks.
    """
    require_one_dimension(mesh)
    error, facts = None, dict.fromkeys((*sizes, f"{name} must have the same dtype"), 0)
    try:
        check()
        if tokens.device.type != mesh.device_type:
            raise ValueError(f"{name} must be on the device of mesh, {mesh.device_type}, got {tokens.device}")
    except (TypeError, ValueError) as raised:
        error = raised  # raised again once the other ranks know
    else:
        dtype = validation.FLOATING.index(validation.dtype_name(tokens))
        facts = dict(zip(facts, (*(tensor.shape[axis] for tensor, axis in sizes.values()), dtype), strict=True))
    agree(torch.zeros(mesh.size(), dtype=torch.int64, device=mesh.device_type), facts, error, mesh)
