"""The text-latent MMDiT with each connection of its residual streams in a kernel.

It is the operation of its name in `gaugeblock.reference.torch`, in bfloat16, float16 or float32. Differentiable once, by the
state and the latents. Modulation multiplies by the scale itself, where the kernels of `layers` take what it is more than 1, and a
scale near 0 would lose its digits: it is torch's.
"""

from functools import partial

from gaugeblock.optimized import text_latent_mmdit_composition as composition
from gaugeblock.optimized.compiled.text_latent_mmdit import connect_out
from gaugeblock.optimized.model_parts import as_it_is
from gaugeblock.optimized.triton.hyper_connections import unchecked_hyper_connection
from gaugeblock.optimized.triton.launch import reject_float64

PARTS = composition.Connections(
    connect_in=unchecked_hyper_connection, connect_out=connect_out, block=as_it_is, reject=reject_float64
)

text_latent_mmdit = partial(composition.text_latent_mmdit, PARTS)
