"""How experts of layers that are built by name are spread over ranks: what `moe_building.build_layer` takes as `dispatchers`.

Each makes of a runner one that is called on every rank with its part: as the functions of `experts*.py`. What a layer has beside
its experts is computed by each rank of the tokens that it has; where these differ, a parameter's gradient on a rank is that of
its own tokens, to be added up over the ranks as data-parallel wrappers do (the layers of `moe_layers.py` do it themselves).
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType, ModuleType, SimpleNamespace

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed import experts, experts_gathered_tokens, experts_replicated_tokens, experts_tensor_parallel
from gaugeblock.optimized.moe_composition import input_scaled_swiglu
from gaugeblock.reference.torch import moe_building

Runner = Callable[..., torch.Tensor]
WAYS: Mapping[str, ModuleType] = MappingProxyType(
    {
        "all_to_all": experts,
        "all_gather": experts_gathered_tokens,
        "replicated_tokens": experts_replicated_tokens,
        "tensor_parallel": experts_tensor_parallel,
    }
)
"""By the names of `moe_parts.DISPATCHERS`, which say what each rank has."""


def _spread(module: ModuleType, runner: Runner, mesh: DeviceMesh) -> Runner:
    """The runner of that name in `module`, on the ranks of `mesh`."""
    if runner is moe_building.input_scaled_swiglu:
        return partial(_input_scaled, partial(module.fused_swiglu, mesh=mesh))
    return partial(getattr(module, runner.__name__), mesh=mesh)


def _input_scaled(fused_swiglu: Runner, *inputs: torch.Tensor) -> torch.Tensor:
    """Llama 4's experts, of which each routed row is a token of its own; layers hand tokens on in float32 at least."""
    return input_scaled_swiglu(SimpleNamespace(fused_swiglu=lambda *rows, out_dtype: fused_swiglu(*rows)), *inputs)


DISPATCHERS: Mapping[str, Callable[[Runner, DeviceMesh], Runner]] = MappingProxyType(
    {name: partial(_spread, way) for name, way in WAYS.items()}
)
