"""The text-latent MMDiT with its block compiled by torch.compile, or, by the library's operations alone, as it is.

One compilation serves all blocks, so that its time does not grow with their number; everything between the matrix products and
attention is fused, the twenty rounds of each connection among them. It is the operation of its name in
`gaugeblock.reference.torch`. Differentiable once, by the state and the latents.
"""

from dataclasses import replace
from functools import partial

import torch

from gaugeblock.optimized import text_latent_mmdit_composition as composition
from gaugeblock.optimized.compiled.library_layers import compiled
from gaugeblock.optimized.compiled.model_parts import accept
from gaugeblock.optimized.model_parts import State, as_it_is
from gaugeblock.reference.torch.hyper_connections import connection
from gaugeblock.reference.torch.precision import at_least_float32


def connect_in(state: State, streams_BSKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read and mix the streams in float32, as the reference does; the results have the streams' dtype but for the last."""
    wide = {name: at_least_float32(each) for name, each in state.items()}
    read_BSD, mixed_BSKD, write_BSK = connection(wide, at_least_float32(streams_BSKD))
    return read_BSD.to(streams_BSKD.dtype), mixed_BSKD.to(streams_BSKD.dtype), write_BSK


def connect_out(
    mixed_BSKD: torch.Tensor, write_BSK: torch.Tensor, branch_BSD: torch.Tensor, gate_B1D: torch.Tensor
) -> torch.Tensor:
    """Add a gated branch to every stream, in float32, and round once."""
    gated_BS1D = (at_least_float32(gate_B1D) * at_least_float32(branch_BSD))[:, :, None]
    return torch.addcmul(at_least_float32(mixed_BSKD), write_BSK[..., None], gated_BS1D).to(mixed_BSKD.dtype)


PARTS = composition.Connections(connect_in=connect_in, connect_out=connect_out, block=compiled, reject=accept)
LIBRARY = replace(PARTS, block=as_it_is)

text_latent_mmdit = partial(composition.text_latent_mmdit, PARTS)
text_latent_mmdit_by_library = partial(composition.text_latent_mmdit, LIBRARY)
