"""Convolutions of images, and what changes their size.

Shapes: B batch_size, C channels, O out_channels, H height, W width, K height and width of a kernel.
"""

import jax
import jax.numpy as jnp


def convolution(
    images: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    *,
    stride: int = 1,
    padding: int | None = None,
) -> jax.Array:
    """As `gaugeblock.reference.torch.convolutions.convolution`."""
    around = weight.shape[-1] // 2 if padding is None else padding
    out = jax.lax.conv_general_dilated(images, weight, (stride, stride), [(around, around)] * 2, precision="highest")
    return out + bias[:, None, None]


def upsample(images: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.convolutions.upsample`."""
    return jnp.repeat(jnp.repeat(images, 2, axis=2), 2, axis=3)
